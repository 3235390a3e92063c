//! The lab: a whole small host in QEMU's software CPU with AMD-V emulated, where Debian's kernel gives a real `/dev/kvm`.
//!
//! - [`packages`], [`apt`]: what it is made of, from the configured mirror
//! - [`cpio`], [`modules`], [`initrd`]: the initrds of the host and of its guests
//! - [`host`]: the running host and the commands in it
//! - [`terminal`]: a command with the user's own terminal
//! - [`share`]: the files that both sides see
//! - [`scenarios`]: the tests
//! - [`cli`]: `cargo xtask lab`

pub mod apt;
pub mod cli;
pub mod cpio;
pub mod host;
pub mod initrd;
pub mod modules;
pub mod packages;
pub mod scenarios;
pub mod share;
pub mod terminal;
