//! The KVM backend of keel-hypervisor on kvm-ioctls: the only crate with an ioctl. (Being written.)
