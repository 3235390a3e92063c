//! The machine: RAM, a VM, CPUs, and a PC's devices on a board.

use std::sync::{Arc, Mutex};

use keel_device_model::{
    Alarm, Board, Device, HostClock, Line, LineSink, Roster, Seat, SharedMmio, SharedPio,
    Surroundings,
};
use keel_devices::acpi_pm::{self, AcpiPm};
use keel_devices::debug_console::{self, DebugConsole};
use keel_devices::debug_exit::{self, DebugExit};
use keel_devices::i8042::{self, I8042};
use keel_devices::ioapic::{self, IoApic};
use keel_devices::msi_test::{self, MsiTest};
use keel_devices::port61::{self, Port61};
use keel_devices::pvpanic::{self, Pvpanic};
use keel_devices::reset_register::{self, ResetRegister};
use keel_devices::rtc::{self, Rtc};
use keel_devices::serial::{self, COM_PORTS, Serial};
use keel_devices::{MsiSink, Shifted};
use keel_hypervisor::cpu_model::Topology;
use keel_hypervisor::{Cpuid, Interrupts, MemorySlot, Msi, Route, Vm, VmState, Width};
use keel_kvm::{Kvm, VmConfig};
use keel_loader::acpi;
use keel_loader::acpi::Platform;
use keel_memory::{GuestRam, layout};

use crate::chardev::{self, Chardev};
use crate::config::{Config, DeviceConfig};
use crate::control::Control;
use crate::cpu::{self, Cpu};
use crate::failure::Failure;
use crate::io_thread::{IoThread, Timer};
use crate::log;
use crate::software::Software;

/// A machine, stopped until [`Control::start`] is called.
pub struct Machine {
    pub ram: GuestRam,
    pub vm: Arc<dyn Vm>,
    pub devices: Roster,
    pub cpus: Vec<Arc<Mutex<Cpu>>>,
    pub clock: Arc<HostClock>,
    pub control: Arc<Control>,
    pub software: Software,
    /// The VM's own state after power-on, for resets.
    power_on: VmState,
}

/// The wiring of a machine that is being built.
struct Builder<'a> {
    config: &'a Config,
    vm: Arc<dyn Vm>,
    board: Board,
    devices: Roster,
    surroundings: Surroundings,
    /// In user space, if it is not in the kernel.
    ioapic: Option<Arc<Seat<IoApic>>>,
}

impl Machine {
    /// Builds the machine and gives the I/O thread what it is to wait for.
    pub fn build(
        config: &Config,
        control: &Arc<Control>,
        io: &mut IoThread,
    ) -> Result<Self, Failure> {
        let kvm = Kvm::open()?;
        let vm: Arc<dyn Vm> = Arc::new(
            kvm.create_vm(VmConfig { interrupts: config.interrupts, ..VmConfig::default() })?,
        );

        let ram = GuestRam::new(&config.ram)?;
        for (index, region) in (0..).zip(ram.regions()) {
            vm.map(MemorySlot {
                index,
                region: region.clone(),
                read_only: false,
                log_dirty: false,
            })?;
        }

        let clock = Arc::new(HostClock::stopped_at(0));
        let surroundings = Surroundings { clock: clock.clone(), machine: control.clone() };
        let mut builder = Builder {
            config,
            vm: vm.clone(),
            board: Board::new(),
            devices: Roster::new(),
            surroundings,
            ioapic: None,
        };
        builder.interrupt_controllers()?;
        builder.serial_ports(control, io)?;
        builder.fixed_devices(&clock, io)?;
        builder.optional_devices(control)?;

        let cpus = create_cpus(config, &kvm, &vm, &builder.board)?;
        control.set_kickers(cpus.iter().map(|cpu| cpu::lock(cpu).kicker()).collect());
        let mut machine = Machine {
            power_on: vm.save()?,
            software: Software::open(config, platform(config))?,
            ram,
            vm,
            devices: builder.devices,
            cpus,
            clock,
            control: control.clone(),
        };
        if config.restore.is_none() {
            machine.load_software()?;
        }
        Ok(machine)
    }

    /// Does what firmware would: puts the kernel and what it is told into RAM, makes the CPUs' memory types alike, and puts
    /// the first CPU at the kernel's entry.
    fn load_software(&mut self) -> Result<(), Failure> {
        let entry = self.software.load(self.ram.memory())?;
        for (index, cpu) in self.cpus.iter().enumerate() {
            let mut cpu = cpu::lock(cpu);
            let mut state = cpu.power_on().clone();
            keel_loader::set_memory_types(&mut state);
            if index == 0 {
                entry.apply(&mut state);
            }
            cpu.load(&state)?;
        }
        Ok(())
    }

    /// Puts CPUs and devices into their state after power-on and loads the kernel again. The machine must be stopped.
    pub fn reset(&mut self) -> Result<(), Failure> {
        // Devices first: a timer of theirs must not raise a line into a controller that has been reset already.
        self.devices.reset();
        self.vm.load(&VmState { clock_ns: None, ..self.power_on.clone() })?;
        self.load_software()
    }

    /// Lets the machine run. `was_stopped`: its guest has run before, and may take the time in between for a hang.
    pub fn start(&self, was_stopped: bool) {
        if was_stopped {
            for cpu in &self.cpus {
                // Only a courtesy.
                let _ = cpu::lock(cpu).notify_paused();
            }
        }
        self.clock.start();
        self.control.start();
    }

    /// Waits until all CPUs have left the guest. Whoever calls this has stopped the machine.
    pub fn wait_until_stopped(&self) {
        self.clock.stop();
        for cpu in &self.cpus {
            drop(cpu::lock(cpu));
        }
    }
}

fn create_cpus(
    config: &Config,
    kvm: &Kvm,
    vm: &Arc<dyn Vm>,
    board: &Board,
) -> Result<Vec<Arc<Mutex<Cpu>>>, Failure> {
    let supported = kvm.supported_cpuid()?;
    let Topology { cpus, .. } = config.topology;
    if cpus as usize > kvm.max_vcpus() {
        return Err(Failure::message(format!(
            "-smp {cpus}: this host's KVM gives a machine at most {} CPUs",
            kvm.max_vcpus()
        )));
    }
    (0..cpus)
        .map(|index| {
            let (cpuid, missing): (Cpuid, _) = config.cpu.cpuid(&supported, &config.topology, index, None)?;
            if index == 0 {
                for feature in missing {
                    log::say(&format!("warning: this host does not have CPU feature {feature}; the guest goes without"));
                }
            }
            let mut vcpu = vm.create_vcpu(config.topology.apic_id(index))?;
            vcpu.set_cpuid(&cpuid)?;
            Ok(Arc::new(Mutex::new(Cpu::new(vcpu, board.bus(), config.report_exits)?)))
        })
        .collect()
}

/// What the guest is told of the hardware.
fn platform(config: &Config) -> Platform {
    let apic_ids = (0..config.topology.cpus).map(|index| config.topology.apic_id(index)).collect();
    let in_kernel = config.interrupts == Interrupts::Kernel;
    let serials = COM_PORTS.iter().zip(&config.serials).filter(|(_, kind)| kind.is_some());
    Platform {
        apic_ids,
        io_apic: acpi::IoApic { id: 0, address: ioapic::BASE as u32, gsi_base: 0 },
        // PICs and PIT come with the kernel's I/O APIC.
        legacy_pic: in_kernel,
        legacy_timer: in_kernel,
        sci_irq: acpi_pm::IRQ as u8,
        pm1_event: acpi_pm::PM1A_EVENT_PORT,
        pm1_control: acpi_pm::PM1A_CONTROL_PORT,
        pm_timer: acpi_pm::PM_TIMER_PORT,
        reset: acpi::Reset { port: reset_register::PORT, value: reset_register::RESET_VALUE },
        s5_sleep_type: acpi_pm::SLEEP_TYPE_S5,
        serial: serials
            .map(|(com, _)| acpi::Serial { port: com.port, irq: com.irq as u8 })
            .collect(),
        rtc: true,
        pvpanic: config.devices.contains(&DeviceConfig::Pvpanic).then_some(pvpanic::PORT),
        // There is one, but without a keyboard: a driver would only look for it in vain.
        i8042: false,
        vga: false,
        aml: Vec::new(),
    }
}

impl Builder<'_> {
    /// Seats a device, enters it in the roster, and gives it an alarm if it has deadlines.
    fn seat<D: Device + 'static>(
        &mut self,
        name: &str,
        device: D,
        line: Line,
        alarm: Option<Arc<dyn Alarm>>,
    ) -> Arc<Seat<D>> {
        let seat = Seat::with_alarm(device, line, &self.surroundings, alarm);
        self.devices.add(name, seat.clone());
        seat
    }

    fn map_pio(
        &self,
        name: &str,
        first: u16,
        count: u16,
        widest: Width,
        io: Arc<dyn SharedPio>,
    ) -> Result<(), Failure> {
        Ok(self.board.map_pio(name, first..=first + (count - 1), widest, io)?)
    }

    /// A line to a global system interrupt, wherever the controller is.
    fn line(&self, gsi: u32) -> Line {
        match &self.ioapic {
            None => Line::new(Gsi { vm: self.vm.clone(), gsi }),
            Some(ioapic) => Line::new(ioapic::Pin::new(ioapic, gsi as u8)),
        }
    }

    /// The wiring of the kernel's interrupt controllers, or the I/O APIC if the kernel has only the local ones.
    fn interrupt_controllers(&mut self) -> Result<(), Failure> {
        if self.config.interrupts == Interrupts::Kernel {
            self.vm.set_routes(&Route::pc())?;
        } else {
            let vm = self.vm.clone();
            let on_routes = Box::new(move |routes: Vec<_>| {
                // The table has a bounded size and every entry was made by our own I/O APIC.
                let set = vm.set_routes(&routes);
                debug_assert!(set.is_ok(), "{set:?}");
            });
            let ioapic = IoApic::new(Arc::new(ToVm(self.vm.clone())), on_routes);
            let ioapic = self.seat("ioapic", ioapic, Line::unconnected(), None);
            let registers = ioapic::BASE..=ioapic::BASE + (ioapic::SIZE - 1);
            let mapped: Arc<dyn SharedMmio> = ioapic.clone();
            self.board.map_mmio("ioapic", registers, ioapic::WIDEST, mapped)?;
            self.board.listen_end_of_interrupt(Arc::new(ioapic::Eoi(ioapic.clone())));
            self.ioapic = Some(ioapic);
            // The speaker gate is the in-kernel PIT's otherwise.
            let port61 = self.seat("port61", Port61::new(), Line::unconnected(), None);
            self.map_pio("port61", port61::PORT, 1, port61::WIDEST, port61)?;
        }
        Ok(())
    }

    fn serial_ports(&mut self, control: &Arc<Control>, io: &mut IoThread) -> Result<(), Failure> {
        let [com1, com3] = self.line(serial::COM1.irq).share();
        let [com2, com4] = self.line(serial::COM2.irq).share();
        for ((number, com), line) in COM_PORTS.iter().enumerate().zip([com1, com2, com3, com4]) {
            let Some(Some(kind)) = self.config.serials.get(number) else { continue };
            let name = format!("serial{number}");
            let Chardev { output, input, raw, keys } =
                chardev::open(kind, &name, control).map_err(Failure::message)?;
            let seat = self.seat(&name, Serial::new(Box::new(output.clone())), line, None);
            self.map_pio(&name, com.port, serial::PORTS, serial::WIDEST, seat.clone())?;
            if let Some(input) = input {
                io.watch_serial(&seat, input, output, keys, control)
                    .map_err(|error| Failure::io("wait for input", error))?;
            }
            if let Some(raw) = raw {
                io.keep(raw);
            }
        }
        Ok(())
    }

    fn fixed_devices(&mut self, clock: &Arc<HostClock>, io: &mut IoThread) -> Result<(), Failure> {
        let keyboard = self.seat("i8042", I8042::new(), self.line(i8042::IRQ), None);
        self.map_pio("i8042", i8042::DATA_PORT, 1, i8042::WIDEST, keyboard.clone())?;
        let command = Shifted::new(keyboard, i8042::COMMAND_PORT - i8042::DATA_PORT);
        self.map_pio("i8042", i8042::COMMAND_PORT, 1, i8042::WIDEST, command)?;

        let ram = &self.config.ram;
        let ram_below_4g = ram.size.min(layout::HOLE_START);
        let clock_config =
            rtc::Config { offset_s: 0, ram_below_4g, ram_above_4g: ram.size - ram_below_4g };
        let timer =
            Timer::new(clock.clone()).map_err(|error| Failure::io("make a timer", error))?;
        let rtc =
            self.seat("rtc", Rtc::new(clock_config), self.line(rtc::IRQ), Some(timer.clone()));
        self.board.map_pio("rtc", rtc::PORTS, rtc::WIDEST, rtc.clone())?;
        io.watch_alarm(timer, Box::new(move || rtc.expire()));

        let timer =
            Timer::new(clock.clone()).map_err(|error| Failure::io("make a timer", error))?;
        let pm = self.seat("acpi-pm", AcpiPm::new(), self.line(acpi_pm::IRQ), Some(timer.clone()));
        self.map_pio("acpi-pm", acpi_pm::PORT, acpi_pm::PORTS, acpi_pm::WIDEST, pm.clone())?;
        io.watch_alarm(timer, Box::new(move || pm.expire()));

        let reset = self.seat("reset-register", ResetRegister::new(), Line::unconnected(), None);
        self.map_pio("reset-register", reset_register::PORT, 1, reset_register::WIDEST, reset)
    }

    fn optional_devices(&mut self, control: &Arc<Control>) -> Result<(), Failure> {
        let nowhere = Line::unconnected;
        for device in &self.config.devices {
            match device {
                DeviceConfig::Pvpanic => {
                    let seat = self.seat("pvpanic", Pvpanic, nowhere(), None);
                    self.map_pio("pvpanic", pvpanic::PORT, 1, pvpanic::WIDEST, seat)?;
                }
                DeviceConfig::DebugExit { port, ports } => {
                    let seat = self.seat("isa-debug-exit", DebugExit, nowhere(), None);
                    self.map_pio("isa-debug-exit", *port, *ports, debug_exit::WIDEST, seat)?;
                }
                DeviceConfig::DebugConsole { port, kind } => {
                    let Chardev { output, .. } =
                        chardev::open(kind, "isa-debugcon", control).map_err(Failure::message)?;
                    let seat = self.seat(
                        "isa-debugcon",
                        DebugConsole::new(Box::new(output)),
                        nowhere(),
                        None,
                    );
                    self.map_pio("isa-debugcon", *port, 1, debug_console::WIDEST, seat)?;
                }
                DeviceConfig::MsiTest => {
                    let seat = self.seat(
                        "keel-msi-test",
                        MsiTest::new(Arc::new(ToVm(self.vm.clone()))),
                        nowhere(),
                        None,
                    );
                    self.map_pio(
                        "keel-msi-test",
                        msi_test::PORT,
                        msi_test::PORTS,
                        msi_test::WIDEST,
                        seat,
                    )?;
                }
            }
        }
        Ok(())
    }
}

/// A line that ends at the kernel's interrupt controllers.
struct Gsi {
    vm: Arc<dyn Vm>,
    gsi: u32,
}

impl LineSink for Gsi {
    fn set(&self, high: bool) {
        // The kernel refuses only lines it does not have, and these are a PC's.
        let set = self.vm.set_line(self.gsi, high);
        debug_assert!(set.is_ok(), "{set:?}");
    }
}

/// Messages to the kernel's local APICs.
struct ToVm(Arc<dyn Vm>);

impl MsiSink for ToVm {
    fn send(&self, msi: Msi) {
        // A message to no CPU, or with no meaning, is the guest's own loss.
        let _ = self.0.signal_msi(msi);
    }
}
