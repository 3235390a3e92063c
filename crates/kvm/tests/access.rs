//! Accesses reach the bus in place, in units, and in order.

mod common;

use common::{Access, Guest};
use keel_hypervisor::{Exit, Width};

#[test]
fn port_accesses_have_the_instructions_width() {
    let mut guest = Guest::new(&[
        0xba, 0x10, 0x02, // mov dx, 0x210
        0xec, // in al, dx
        0xed, // in ax, dx
        0x66, 0xed, // in eax, dx
        0xee, // out dx, al
        0xef, // out dx, ax
        0x66, 0xef, // out dx, eax
        0xf4, // hlt
    ]);
    guest.bus.ports.insert(0x210, vec![0x12, 0x3456, 0x789a_bcde]);
    assert_eq!(guest.run(), Exit::Halted);
    assert_eq!(
        guest.bus.log,
        [
            Access::In(0x210, Width::Byte),
            Access::In(0x210, Width::Word),
            Access::In(0x210, Width::Dword),
            Access::Out(0x210, Width::Byte, 0xde),
            Access::Out(0x210, Width::Word, 0xbcde),
            Access::Out(0x210, Width::Dword, 0x789a_bcde),
        ]
    );
}

#[test]
fn string_instructions_arrive_unit_by_unit() {
    let mut guest = Guest::new(&[
        0xba, 0xf0, 0x01, // mov dx, 0x1f0
        0xbf, 0x00, 0x20, // mov di, 0x2000
        0xb9, 0x04, 0x00, // mov cx, 4
        0xf3, 0x6d, // rep insw
        0xbe, 0x00, 0x20, // mov si, 0x2000
        0xb9, 0x08, 0x00, // mov cx, 8
        0xf3, 0x6e, // rep outsb
        0xf4, // hlt
    ]);
    guest.bus.ports.insert(0x1f0, vec![0x1100, 0x3322, 0x5544, 0x7766]);
    assert_eq!(guest.run(), Exit::Halted);
    let ins = std::iter::repeat_n(Access::In(0x1f0, Width::Word), 4);
    let outs = (0..8).map(|n| Access::Out(0x1f0, Width::Byte, n * 0x11));
    assert_eq!(guest.bus.log, ins.chain(outs).collect::<Vec<_>>());
}

#[test]
fn memory_accesses_that_cross_a_page_are_split_into_units() {
    let mut guest = Guest::new(&[
        0xb8, 0x00, 0xd0, // mov ax, 0xd000
        0x8e, 0xd8, // mov ds, ax
        0x66, 0xa1, 0x00, 0x00, // mov eax, [0]
        0x66, 0xa3, 0x08, 0x00, // mov [8], eax
        0x66, 0xb8, 0x44, 0x33, 0x22, 0x11, // mov eax, 0x11223344
        0x66, 0xa3, 0xff, 0x0f, // mov [0xfff], eax
        0xf4, // hlt
    ]);
    guest.bus.memory.insert(0xd0000, 0xa1b2_c3d4);
    assert_eq!(guest.run(), Exit::Halted);
    assert_eq!(
        guest.bus.log[..2],
        [Access::Load(0xd0000, Width::Dword), Access::Store(0xd0008, Width::Dword, 0xa1b2_c3d4)]
    );
    let mut bytes = [0; 4];
    for access in &guest.bus.log[2..] {
        let Access::Store(gpa, width, value) = *access else { panic!("{access:?}") };
        assert_eq!(gpa % width.bytes(), 0, "a unit is aligned");
        for byte in 0..width.bytes() {
            bytes[(gpa - 0xd0fff + byte) as usize] = (value >> (8 * byte)) as u8;
        }
    }
    assert_eq!(bytes, [0x44, 0x33, 0x22, 0x11]);
}

#[test]
fn state_of_a_vcpu_in_the_middle_of_an_access_is_that_after_it() {
    // The machine is stopped in the middle of `in al, dx`, as when a device asks for it.
    struct Stop<'a> {
        kick: &'a dyn keel_hypervisor::Kick,
        reads: u32,
    }
    impl keel_hypervisor::Bus for Stop<'_> {
        fn pio_read(&mut self, _port: u16, _width: Width) -> u32 {
            self.reads += 1;
            self.kick.kick();
            0x5a
        }
        fn pio_write(&mut self, _port: u16, _width: Width, _value: u32) {}
        fn mmio_read(&mut self, _gpa: u64, width: Width) -> u64 {
            width.mask()
        }
        fn mmio_write(&mut self, _gpa: u64, _width: Width, _value: u64) {}
        fn end_of_interrupt(&mut self, _vector: u8) {}
    }
    let mut guest = Guest::new(&[
        0xe4, 0x10, // in al, 0x10
        0xf4, // hlt
    ]);
    let kick = guest.vcpu.kicker();
    let mut bus = Stop { kick: &*kick, reads: 0 };
    assert_eq!(guest.vcpu.run(&mut bus).unwrap(), Exit::Kicked);
    let state = guest.vcpu.settle(&mut bus).unwrap().save().unwrap();
    assert_eq!(state.registers.rax & 0xff, 0x5a, "the value has arrived");
    assert_eq!(state.registers.rip, common::CODE + 2, "the instruction has ended");
    assert_eq!(bus.reads, 1, "and was made once");
    assert_eq!(guest.vcpu.run(&mut bus).unwrap(), Exit::Halted);
}

#[test]
fn a_triple_fault_is_told() {
    // Protected mode with an empty IDT: no exception can be delivered. (In real mode KVM's emulator does not look at the IDT's limit.)
    let mut guest = Guest::new(&[0x0f, 0x0b]); // ud2
    guest.change(|state| {
        common::set_flat(state, false);
        state.segments.idt = Default::default();
    });
    assert_eq!(guest.run(), Exit::TripleFault);
}

#[test]
fn single_steps_and_breakpoints_stop_where_they_should() {
    use keel_hypervisor::Debug;
    let mut guest = Guest::new(&[0x90, 0x90, 0x90, 0xf4]); // nop; nop; nop; hlt
    guest.vcpu.set_debug(&Debug { single_step: true, ..Debug::default() }).unwrap();
    for pc in [1, 2] {
        match guest.run() {
            Exit::Debug(stop) => assert_eq!((stop.pc, stop.exception), (common::CODE + pc, 1)),
            other => panic!("{other:?}"),
        }
    }
    guest.vcpu.set_debug(&Debug::default()).unwrap();
    assert_eq!(guest.run(), Exit::Halted);
}
