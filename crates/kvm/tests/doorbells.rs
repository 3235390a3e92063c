//! Doorbells: accesses that become events without leaving the kernel.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{Access, CODE, Guest};
use keel_hypervisor::{Doorbell, DoorbellAddress, Exit, Vm, Width};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const PORT: u16 = 0x340;
const GPA: u64 = 0xd0040;
/// The values written, of the full width, and the one of them that rings a matching doorbell.
const VALUES: [u64; 3] = [0x1122_3344_5566_7788, 0x99aa_bbcc_ddee_ff00, 0x1122_3344_5566_7799];

/// Code that writes these values, in `width`, to the port or the address.
fn writes(guest: &Guest, at: DoorbellAddress, width: Width) {
    let mut code = vec![0xb8, 0x00, 0xd0, 0x8e, 0xc0]; // mov ax, 0xd000; mov es, ax
    for (index, value) in VALUES.iter().enumerate() {
        let data = 0x5000 + 8 * index as u16;
        guest.write(data.into(), &value.to_le_bytes());
        let [low, high] = data.to_le_bytes();
        code.extend([0x66, 0xa1, low, high]); // mov eax, [data]
        code.extend([0x0f, 0x6f, 0x06, low, high]); // movq mm0, [data]
        code.extend([0xba, PORT as u8, (PORT >> 8) as u8]); // mov dx, PORT
        let out: &[u8] = match (at, width) {
            (DoorbellAddress::Pio(_), Width::Byte) => &[0xee],
            (DoorbellAddress::Pio(_), Width::Word) => &[0xef],
            (DoorbellAddress::Pio(_), _) => &[0x66, 0xef],
            (DoorbellAddress::Mmio(_), Width::Byte) => &[0x26, 0xa2, 0x40, 0x00], // mov es:[0x40], al
            (DoorbellAddress::Mmio(_), Width::Word) => &[0x26, 0xa3, 0x40, 0x00],
            (DoorbellAddress::Mmio(_), Width::Dword) => &[0x66, 0x26, 0xa3, 0x40, 0x00],
            (DoorbellAddress::Mmio(_), Width::Qword) => &[0x26, 0x0f, 0x7f, 0x06, 0x40, 0x00], // movq es:[0x40], mm0
        };
        code.extend(out);
    }
    code.push(0xf4); // hlt
    guest.write(CODE, &code);
}

fn access(at: DoorbellAddress, width: Width, value: u64) -> Access {
    match at {
        DoorbellAddress::Pio(port) => Access::Out(port, width, (value & width.mask()) as u32),
        DoorbellAddress::Mmio(gpa) => Access::Store(gpa, width, value & width.mask()),
    }
}

/// Runs the writes. Returns how often it rang and what reached the bus.
fn ring(guest: &mut Guest, event: &EventFd) -> (u64, Vec<Access>) {
    guest.jump(CODE);
    assert_eq!(guest.run(), Exit::Halted);
    (event.read().unwrap_or(0), std::mem::take(&mut guest.bus.log))
}

#[test]
fn doorbells_ring_for_their_width_and_value_and_nothing_else() {
    let mut guest = Guest::new(&[]);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let widths = [Width::Byte, Width::Word, Width::Dword, Width::Qword];
    for at in [DoorbellAddress::Pio(PORT), DoorbellAddress::Mmio(GPA)] {
        for width in widths {
            if width == Width::Qword && matches!(at, DoorbellAddress::Pio(_)) {
                continue;
            }
            writes(&guest, at, width);
            let all: Vec<_> = VALUES.iter().map(|value| access(at, width, *value)).collect();
            assert_eq!(ring(&mut guest, &event), (0, all.clone()), "without a doorbell");

            let any = Doorbell { at, matching: None };
            guest.vm.attach_ioevent(&event, any).unwrap();
            assert_eq!(ring(&mut guest, &event), (3, vec![]), "{any:x?} {width:?}");
            guest.vm.detach_ioevent(&event, any).unwrap();

            let one = Doorbell { at, matching: Some((width, VALUES[1] & width.mask())) };
            guest.vm.attach_ioevent(&event, one).unwrap();
            assert_eq!(ring(&mut guest, &event), (1, vec![all[0], all[2]]), "{one:x?}");
            guest.vm.detach_ioevent(&event, one).unwrap();
            assert_eq!(ring(&mut guest, &event), (0, all.clone()), "after {one:x?}");

            // One of another width hears nothing.
            for other in widths.into_iter().filter(|other| *other != width) {
                let other = Doorbell {
                    at,
                    matching: Some((other, VALUES[1] & width.mask() & other.mask())),
                };
                guest.vm.attach_ioevent(&event, other).unwrap();
                assert_eq!(ring(&mut guest, &event), (0, all.clone()), "{width:?} to {other:x?}");
                guest.vm.detach_ioevent(&event, other).unwrap();
            }
        }
    }
}

#[test]
fn a_doorbell_is_there_once() {
    let guest = Guest::new(&[]);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let doorbell = Doorbell { at: DoorbellAddress::Pio(PORT), matching: Some((Width::Word, 3)) };
    guest.vm.attach_ioevent(&event, doorbell).unwrap();
    let error = guest.vm.attach_ioevent(&event, doorbell).unwrap_err();
    assert!(error.to_string().starts_with("KVM_IOEVENTFD on Doorbell"), "{error}");
    guest.vm.detach_ioevent(&event, doorbell).unwrap();
    guest.vm.detach_ioevent(&event, doorbell).unwrap_err();
}
