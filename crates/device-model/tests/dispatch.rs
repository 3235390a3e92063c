//! The board's dispatch against an oracle that looks at one byte at a time, and what a hostile guest can make a tally hold.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use keel_device_model::{
    Board, BoardBus, Direction, MapError, SharedMmio, SharedPio, Space, Tally,
};
use keel_hypervisor::{Bus, Width};
use proptest::prelude::*;

const WIDTHS: [Width; 4] = [Width::Byte, Width::Word, Width::Dword, Width::Qword];

/// What reached a device: which, where in it, how wide, and the value if it was a write.
type Reached = (usize, u64, Width, Option<u64>);

/// Answers each byte by its own number and offset, however it is asked for it.
struct Probe {
    id: usize,
    log: Arc<Mutex<Vec<Reached>>>,
}

fn byte(id: usize, offset: u64) -> u8 {
    (id as u64 * 37).wrapping_add(offset.wrapping_mul(11)) as u8
}

impl Probe {
    fn read(&self, offset: u64, width: Width) -> u64 {
        self.log.lock().unwrap().push((self.id, offset, width, None));
        let bytes = (0..8).map(|n| byte(self.id, offset.wrapping_add(n)));
        // More than was asked for: the board must cut it off.
        bytes.rev().fold(0, |value, byte| value << 8 | u64::from(byte))
    }
    fn write(&self, offset: u64, width: Width, value: u64) {
        self.log.lock().unwrap().push((self.id, offset, width, Some(value)));
    }
}

impl SharedPio for Probe {
    fn read(&self, offset: u16, width: Width) -> u32 {
        Probe::read(self, offset.into(), width) as u32
    }
    fn write(&self, offset: u16, width: Width, value: u32) {
        Probe::write(self, offset.into(), width, value.into());
    }
}

impl SharedMmio for Probe {
    fn read(&self, offset: u64, width: Width) -> u64 {
        Probe::read(self, offset, width)
    }
    fn write(&self, offset: u64, width: Width, value: u64) {
        Probe::write(self, offset, width, value);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Map(u64, u64, Width),
    Unmap(u64),
    Read(u64, Width),
    Write(u64, Width, u64),
}

/// Places close together at both ends of the space and in the middle, so that ranges meet and accesses run over ends.
fn place(last: u64) -> impl Strategy<Value = u64> {
    prop_oneof![
        0..48u64,
        (0..48u64).prop_map(move |back| last - back),
        (0..48u64).prop_map(move |n| last / 2 + n)
    ]
}

fn step(last: u64) -> impl Strategy<Value = Step> {
    let width =
        move || prop::sample::select(if last > 0xffff { &WIDTHS[..] } else { &WIDTHS[..3] });
    let range = (place(last), prop_oneof![4 => 0..12u64, 1 => Just(u64::MAX)]);
    prop_oneof![
        2 => (range, width()).prop_map(move |((first, more), widest)| Step::Map(first, first.saturating_add(more).min(last), widest)),
        1 => place(last).prop_map(Step::Unmap),
        6 => (place(last), width()).prop_map(|(at, width)| Step::Read(at, width)),
        6 => (place(last), width(), any::<u64>()).prop_map(|(at, width, value)| Step::Write(at, width, value & width.mask())),
    ]
}

/// What is mapped, in the simplest way: by first address, the last one, the widest access, and whose it is.
type Oracle = BTreeMap<u64, (u64, Width, usize)>;

fn find(oracle: &Oracle, at: u64) -> Option<(u64, u64, Width, usize)> {
    let (first, (last, widest, id)) = oracle.range(..=at).next_back()?;
    (at <= *last).then_some((*first, *last, *widest, *id))
}

/// One of the two spaces of a board.
struct World {
    space: Space,
    board: Board,
    bus: BoardBus,
    log: Arc<Mutex<Vec<Reached>>>,
    oracle: Oracle,
    unclaimed: u64,
}

impl World {
    fn new(space: Space) -> Self {
        let board = Board::new();
        let bus = board.bus();
        World { space, board, bus, log: Arc::default(), oracle: Oracle::new(), unclaimed: 0 }
    }

    fn last(&self) -> u64 {
        if self.space == Space::Pio { 0xffff } else { u64::MAX }
    }

    fn map(&mut self, id: usize, first: u64, last: u64, widest: Width) {
        let probe = Arc::new(Probe { id, log: self.log.clone() });
        let name = format!("d{id}");
        let result = match self.space {
            Space::Pio => self.board.map_pio(&name, first as u16..=last as u16, widest, probe),
            Space::Mmio => self.board.map_mmio(&name, first..=last, widest, probe),
        };
        let other = self.oracle.iter().find(|(begin, (end, ..))| first <= *end && **begin <= last);
        match other {
            Some((_, (.., other))) => {
                assert_eq!(
                    result,
                    Err(MapError::Overlap { name, first, last, other: format!("d{other}") })
                );
            }
            None => {
                assert_eq!(result, Ok(()));
                self.oracle.insert(first, (last, widest, id));
            }
        }
    }

    fn unmap(&mut self, first: u64) {
        let result = match self.space {
            Space::Pio => self.board.unmap_pio(first as u16),
            Space::Mmio => self.board.unmap_mmio(first),
        };
        let expected = self.oracle.remove(&first).map(drop).ok_or(MapError::Nothing(first));
        assert_eq!(result, expected);
    }

    fn access(&mut self, at: u64, width: Width, value: Option<u64>) {
        let result = match (self.space, value) {
            (Space::Pio, None) => u64::from(self.bus.pio_read(at as u16, width)),
            (Space::Mmio, None) => self.bus.mmio_read(at, width),
            (Space::Pio, Some(value)) => {
                self.bus.pio_write(at as u16, width, value as u32);
                0
            }
            (Space::Mmio, Some(value)) => {
                self.bus.mmio_write(at, width, value);
                0
            }
        };
        // Addresses wrap at the end of their space.
        let addresses: Vec<u64> =
            (0..width.bytes()).map(|n| at.wrapping_add(n) & self.last()).collect();
        let owners: Vec<_> = addresses.iter().map(|at| find(&self.oracle, *at)).collect();
        let log = std::mem::take(&mut *self.log.lock().unwrap());

        if value.is_none() {
            for (n, (at, owner)) in addresses.iter().zip(&owners).enumerate() {
                let expected = owner.map_or(0xff, |(first, .., id)| byte(id, at - first));
                assert_eq!((result >> (8 * n)) as u8, expected, "byte {n} of {width:?} at {at:#x}");
            }
            assert_eq!(result & !width.mask(), 0, "zero-extended");
        }
        // Each byte that is claimed has reached its device once, lower addresses first, as part of an access that fits.
        let mut reached = log.iter().flat_map(|(id, offset, width, value)| {
            (0..width.bytes())
                .map(move |n| (*id, offset + n, value.map(|value| (value >> (8 * n)) as u8)))
        });
        for (n, (at, owner)) in addresses.iter().zip(&owners).enumerate() {
            if let Some((first, _, _, id)) = owner {
                let value = value.map(|value| (value >> (8 * n)) as u8);
                assert_eq!(
                    reached.next(),
                    Some((*id, at - first, value)),
                    "byte {n} of {width:?} at {at:#x}"
                );
            }
        }
        assert_eq!(reached.next(), None);
        for (id, offset, width, _) in &log {
            let (first, (last, widest, _)) =
                self.oracle.iter().find(|(_, (.., owner))| owner == id).unwrap();
            assert!(width <= widest && width.bytes() - 1 <= last - (first + offset));
        }
        // What fits is not split, and what nobody claims is counted, once.
        if let Some((first, last, widest, id)) = owners[0]
            && width <= widest
            && width.bytes() - 1 <= last - at
        {
            assert_eq!(log, [(id, at - first, width, value)]);
        }
        let counted: Vec<_> = self.bus.take_tally().unclaimed.into_iter().collect();
        if owners.iter().all(Option::is_none) {
            let direction = if value.is_some() { Direction::Write } else { Direction::Read };
            assert_eq!(counted, [(((self.space, direction), at), 1)]);
            self.unclaimed += 1;
        } else if owners.iter().all(Option::is_some) {
            assert_eq!(counted, []);
        }
    }

    fn run(&mut self, steps: &[Step]) {
        for (id, step) in steps.iter().enumerate() {
            match *step {
                Step::Map(first, last, widest) => self.map(id, first, last, widest),
                Step::Unmap(first) => self.unmap(first),
                Step::Read(at, width) => self.access(at, width, None),
                Step::Write(at, width, value) => self.access(at, width, Some(value)),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ports_are_dispatched_as_the_oracle_says(steps in prop::collection::vec(step(0xffff), 0..120)) {
        World::new(Space::Pio).run(&steps);
    }

    #[test]
    fn memory_is_dispatched_as_the_oracle_says(steps in prop::collection::vec(step(u64::MAX), 0..120)) {
        World::new(Space::Mmio).run(&steps);
    }
}

#[test]
fn the_ends_of_both_spaces_belong_to_devices_too() {
    for space in [Space::Pio, Space::Mmio] {
        let mut world = World::new(space);
        let last = world.last();
        world.map(1, last - 1, last, Width::Dword);
        world.map(2, 0, 2, Width::Word);
        for at in [last - 4, last - 3, last - 2, last - 1, last, 0, 1, 2, 3] {
            for width in &WIDTHS[..if space == Space::Pio { 3 } else { 4 }] {
                world.access(at, *width, None);
                world.access(at, *width, Some(0x1122_3344_5566_7788 & width.mask()));
            }
        }
        world.unmap(0);
        world.unmap(last - 1);
        world.map(3, 0, last, Width::Qword);
        world.access(last / 2, Width::Dword, None);
        world.access(last, Width::Dword, None);
    }
}

#[test]
#[allow(clippy::reversed_empty_ranges, reason = "what is refused")]
fn a_range_that_ends_before_it_begins_is_refused() {
    let board = Board::new();
    let probe = Arc::new(Probe { id: 0, log: Arc::default() });
    let empty = Err(MapError::Empty { name: "probe".into() });
    assert_eq!(board.map_pio("probe", 5..=4, Width::Byte, probe.clone()), empty);
    assert_eq!(board.map_mmio("probe", 5..=4, Width::Byte, probe), empty);
}

#[test]
fn every_port_but_one_can_be_a_range_of_its_own() {
    let board = Board::new();
    let log = Arc::<Mutex<Vec<Reached>>>::default();
    let map = |port: u16| {
        let probe = Probe { id: port.into(), log: log.clone() };
        board.map_pio("probe", port..=port, Width::Byte, Arc::new(probe))
    };
    (1..=u16::MAX).try_for_each(map).unwrap();
    let mut bus = board.bus();
    for port in [1, 2, 0x7fff, 0xfffe, 0xffff] {
        assert_eq!(bus.pio_read(port, Width::Byte), u32::from(byte(port.into(), 0)), "{port:#x}");
    }
    assert_eq!(map(0), Err(MapError::Full { name: "probe".into() }), "but one");
    assert_eq!(bus.pio_read(0, Width::Byte), 0xff);
}

#[test]
fn the_map_may_change_in_the_middle_of_an_access() {
    // A register that moves another device about, as a PCI bridge does.
    struct Mover {
        board: Board,
        moved: Arc<Probe>,
    }
    impl SharedPio for Mover {
        fn read(&self, _offset: u16, _width: Width) -> u32 {
            let _ = self.board.unmap_mmio(0x1000);
            7
        }
        fn write(&self, _offset: u16, _width: Width, value: u32) {
            self.board
                .map_mmio("moved", 0x1000..=u64::from(value), Width::Qword, self.moved.clone())
                .unwrap();
        }
    }
    let board = Board::new();
    let moved = Arc::new(Probe { id: 3, log: Arc::default() });
    let mover = Arc::new(Mover { board: board.clone(), moved: moved.clone() });
    board.map_pio("mover", 0x10..=0x13, Width::Dword, mover).unwrap();
    let [mut one, mut other] = [(); 2].map(|()| board.bus());
    for _ in 0..3 {
        one.pio_write(0x10, Width::Dword, 0x10ff);
        assert_eq!(one.mmio_read(0x1005, Width::Byte), u64::from(byte(3, 5)));
        assert_eq!(other.mmio_read(0x1006, Width::Byte), u64::from(byte(3, 6)));
        assert_eq!(one.pio_read(0x10, Width::Dword), 7);
        assert_eq!(other.mmio_read(0x1005, Width::Byte), 0xff);
        assert_eq!(one.mmio_read(0x1005, Width::Byte), 0xff);
    }
    drop((one, other));
    drop(board);
    assert!(Arc::strong_count(&moved) >= 1);
}

#[test]
fn a_hostile_guest_can_not_grow_a_tally() {
    let board = Board::new();
    board
        .map_pio("probe", 0x10..=0x1f, Width::Byte, Arc::new(Probe { id: 0, log: Arc::default() }))
        .unwrap();
    let mut bus = board.bus();
    bus.keep_times();
    let mut all = Tally::default();
    for round in 0..4_u64 {
        for n in 0..100_000_u64 {
            bus.mmio_write((round << 32 | n).wrapping_mul(0x9e37_79b9_7f4a_7c15), Width::Qword, n);
            bus.pio_read(n as u16 | 0x8000, Width::Word);
        }
        bus.pio_read(0x10, Width::Word);
        let tally = bus.take_tally();
        assert_eq!(tally.unclaimed.len(), Tally::MOST_ADDRESSES);
        assert_eq!(tally.unclaimed.values().sum::<u64>() + tally.unclaimed_elsewhere, 200_000);
        assert_eq!(tally.devices.len(), 1);
        let spent = tally.devices[&("probe".to_owned(), (Space::Pio, Direction::Read))];
        assert_eq!(spent.count, 2, "two halves of a word");
        all.merge(tally);
        assert_eq!(all.unclaimed.len(), Tally::MOST_ADDRESSES, "merging keeps the bound");
    }
    assert_eq!(all.unclaimed.values().sum::<u64>() + all.unclaimed_elsewhere, 800_000);
    assert_eq!(all.devices.values().next().unwrap().count, 8);
    let empty = bus.take_tally();
    assert!(
        empty.unclaimed.is_empty() && empty.devices.is_empty() && empty.unclaimed_elsewhere == 0
    );
}
