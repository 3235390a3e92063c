//! What a device is, and the board that devices are plugged into.
//!
//! A device is a plain struct with `&mut self` methods that owns its registers and is [`Lent`] what it needs for one access. Here is
//! one, whole, with its test:
//!
//! ```
//! use keel_device_model::testing::Workbench;
//! use keel_device_model::{Device, Lent, PortIo, Request, StateError};
//! use keel_hypervisor::Width;
//!
//! /// A port that counts what is written to it, and powers off at 3.
//! #[derive(Default)]
//! struct Counter {
//!     count: u32,
//! }
//!
//! impl PortIo for Counter {
//!     fn pio_read(&mut self, _offset: u16, _width: Width, _lent: &Lent) -> u32 {
//!         self.count
//!     }
//!     fn pio_write(&mut self, _offset: u16, _width: Width, _value: u32, lent: &Lent) {
//!         self.count += 1;
//!         if self.count == 3 {
//!             lent.machine.request(Request::PowerOff);
//!         }
//!     }
//! }
//!
//! impl Device for Counter {
//!     type State = u32;
//!     const KIND: &'static str = "counter";
//!     const VERSION: u32 = 1;
//!     fn reset(&mut self, _lent: &Lent) {
//!         self.count = 0;
//!     }
//!     fn save(&self) -> u32 {
//!         self.count
//!     }
//!     fn restore(&mut self, count: u32, _lent: &Lent) -> Result<(), StateError> {
//!         self.count = count;
//!         Ok(())
//!     }
//! }
//!
//! let bench = Workbench::new();
//! let mut counter = Counter::default();
//! for _ in 0..3 {
//!     counter.pio_write(0, Width::Byte, 0, &bench.lent());
//! }
//! assert_eq!(bench.requests(), [Request::PowerOff]);
//! ```
//!
//! A machine seats it, maps it, and gives every vCPU a bus:
//!
//! ```
//! # use std::sync::Arc;
//! # use keel_device_model::{Board, Device, HostClock, Lent, Line, PortIo, Seat, StateError, Surroundings, testing};
//! # use keel_hypervisor::{Bus, Width};
//! # #[derive(Default)]
//! # struct Counter { count: u32 }
//! # impl PortIo for Counter {
//! #     fn pio_read(&mut self, _offset: u16, _width: Width, _lent: &Lent) -> u32 { self.count }
//! #     fn pio_write(&mut self, _offset: u16, _width: Width, _value: u32, _lent: &Lent) { self.count += 1; }
//! # }
//! # impl Device for Counter {
//! #     type State = u32;
//! #     const KIND: &'static str = "counter";
//! #     const VERSION: u32 = 1;
//! #     fn reset(&mut self, _lent: &Lent) { self.count = 0; }
//! #     fn save(&self) -> u32 { self.count }
//! #     fn restore(&mut self, count: u32, _lent: &Lent) -> Result<(), StateError> { self.count = count; Ok(()) }
//! # }
//! let surroundings = Surroundings {
//!     clock: Arc::new(HostClock::stopped_at(0)),
//!     machine: Arc::new(testing::Requests::default()),
//! };
//! let counter = Seat::new(Counter::default(), Line::unconnected(), &surroundings);
//! let board = Board::new();
//! board.map_pio("counter", 0x500..=0x503, Width::Dword, counter)?;
//!
//! let mut bus = board.bus();
//! bus.pio_write(0x500, Width::Dword, 7);
//! assert_eq!(bus.pio_read(0x500, Width::Dword), 1);
//! assert_eq!(bus.pio_read(0x504, Width::Byte), 0xff, "nothing there");
//! # Ok::<(), keel_device_model::MapError>(())
//! ```
//!
//! # Modules
//!
//! | file | subject |
//! |---|---|
//! | `device` | [`Device`]: reset, save, restore, deadlines |
//! | `io` | [`PortIo`], [`MmioIo`] and what a device is [`Lent`] |
//! | `line` | [`Line`]: interrupt lines, edge and level |
//! | `clock` | [`Clock`]: virtual and real time |
//! | `machine` | [`Machine`]: what a device can ask for |
//! | `seat` | [`Seat`]: a device wired, and locked for the threads that reach it |
//! | `board` | [`Board`]: what is mapped where |
//! | `bus` | [`BoardBus`]: a vCPU's way through the board |
//! | `tally` | [`Tally`]: what a vCPU's accesses were and how long they took |
//! | `state` | [`Section`], [`Roster`]: saved states |
//! | `testing` | a [`Workbench`](testing::Workbench) for devices' tests |
#![forbid(unsafe_code)]

mod board;
mod bus;
mod clock;
mod device;
mod io;
mod line;
mod machine;
mod seat;
mod state;
mod tally;
pub mod testing;

pub use board::{Board, MapError};
pub use bus::BoardBus;
pub use clock::{Clock, HostClock, Nanos};
pub use device::Device;
pub use io::{EndOfInterrupt, Lent, MmioIo, PortIo, SharedMmio, SharedPio};
pub use line::{Line, LineSink};
pub use machine::{Machine, Request};
pub use seat::{Alarm, Seat, Surroundings};
pub use state::{Roster, Section, StateError, Stateful};
pub use tally::{Access, Direction, Space, Spent, Tally};
