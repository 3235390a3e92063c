//! Guest RAM on every backing this machine has.

use std::error::Error as _;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion};

use super::*;
use crate::{layout, sys};

const SIZE: u64 = 4 << 20;

fn config(backing: Backing) -> RamConfig {
    RamConfig { backing, ..RamConfig::new(SIZE) }
}

fn ram(backing: Backing) -> Result<GuestRam, Error> {
    GuestRam::new(&config(backing))
}

/// The message with its reasons.
fn chain(error: Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text += &format!(": {error}");
        next = error.source();
    }
    text
}

fn pages(ram: &GuestRam) -> Vec<u64> {
    let mut pages = Vec::new();
    ram.for_each_page(|gfn, page| {
        assert_eq!(page.len(), 4096);
        pages.push(gfn);
        Ok::<_, Error>(())
    })
    .unwrap();
    pages
}

fn works(ram: &GuestRam) {
    let memory = ram.memory();
    assert!(pages(ram).is_empty());
    memory.write_obj(0x1234_5678_u32, GuestAddress(0x3000)).unwrap();
    memory.write_obj(1_u8, GuestAddress(SIZE - 1)).unwrap();
    // Touched, and zero again.
    memory.write_obj(0_u8, GuestAddress(0x9000)).unwrap();
    assert_eq!(memory.read_obj::<u32>(GuestAddress(0x3000)).unwrap(), 0x1234_5678);
    assert!(memory.read_obj::<u32>(GuestAddress(SIZE)).is_err());
    assert_eq!(pages(ram), [3, 1023]);
    assert_eq!(ram.frames().len(), 1024);
    assert!(ram.contains(1023) && !ram.contains(1024) && !ram.contains(u64::MAX));
    let mut own = PageSet::new();
    ram.take_own_writes(&mut own);
    assert_eq!(own.iter().collect::<Vec<_>>(), [3, 9, 1023]);
}

/// How many bytes of a region are in memory: see proc_pid_pagemap(5). Not smaps, which counts neighbouring mappings as one.
fn resident(region: &Region) -> u64 {
    let map = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut entries = vec![0; (region.len() / PAGE_SIZE * 8) as usize];
    map.read_exact_at(&mut entries, region.as_ptr() as u64 / PAGE_SIZE * 8).unwrap();
    // Bit 63, of the last byte of eight: present.
    entries.chunks(8).filter(|entry| entry[7] >> 7 == 1).count() as u64 * PAGE_SIZE
}

#[test]
fn anonymous_memory_costs_nothing_until_it_is_touched() {
    let ram = ram(Backing::Anonymous).unwrap();
    assert!(pages(&ram).is_empty());
    assert_eq!(resident(&ram.regions()[0]), 0, "reading it brought pages in");
    works(&ram);
}

#[test]
fn a_guest_of_many_tib_is_there_at_once() {
    let ram = GuestRam::new(&RamConfig::new(8 << 40)).unwrap();
    let last = layout::HOLE_END + (8 << 40) - layout::HOLE_START - 1;
    ram.memory().write_obj(1_u8, GuestAddress(last)).unwrap();
    ram.memory().write_obj(1_u8, GuestAddress(layout::HOLE_START - 1)).unwrap();
    assert!(ram.memory().write_obj(1_u8, GuestAddress(layout::HOLE_START)).is_err());
    assert!(!ram.contains(layout::HOLE_START / PAGE_SIZE));
    let mut own = PageSet::new();
    ram.take_own_writes(&mut own);
    assert_eq!(
        own.iter().collect::<Vec<_>>(),
        [layout::HOLE_START / PAGE_SIZE - 1, last / PAGE_SIZE]
    );
}

#[test]
fn shared_memory_is_seen_through_its_file() {
    let shared = ram(Backing::Shared).unwrap();
    works(&shared);
    let at = shared.regions()[0].file_offset().unwrap();
    assert_eq!(at.file().metadata().unwrap().len(), SIZE);
    at.file().write_all_at(b"from outside", 0x5000).unwrap();
    assert_eq!(pages(&shared), [3, 5, 1023]);
}

#[test]
fn the_file_continues_above_the_hole() {
    let shared = GuestRam::new(&RamConfig {
        backing: Backing::Shared,
        ..RamConfig::new(layout::HOLE_START + SIZE)
    })
    .unwrap();
    shared.memory().write_slice(b"high", GuestAddress(layout::HOLE_END + 0x1000)).unwrap();
    assert_eq!(pages(&shared), [layout::HOLE_END / PAGE_SIZE + 1]);
    let mut bytes = [0; 4];
    let file = shared.regions()[0].file_offset().unwrap().file();
    file.read_exact_at(&mut bytes, layout::HOLE_START + 0x1000).unwrap();
    assert_eq!(&bytes, b"high");
}

#[test]
fn files_and_directories() {
    let directory = tempfile::tempdir().unwrap();
    works(&ram(Backing::Path(directory.path().into())).unwrap());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "no name is left");

    let path = directory.path().join("ram");
    let private = ram(Backing::Path(path.clone())).unwrap();
    works(&private);
    assert!(pages::is_zero(&std::fs::read(&path).unwrap()), "the file is left alone");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE);

    let shared = RamConfig { share: true, ..config(Backing::Path(path.clone())) };
    works(&GuestRam::new(&shared).unwrap());
    assert!(!pages::is_zero(&std::fs::read(&path).unwrap()), "the file has what was written");
    // Preallocation keeps what the file holds, shared and private.
    for share in [true, false] {
        let kept = RamConfig { share, prealloc: true, ..shared.clone() };
        assert_eq!(pages(&GuestRam::new(&kept).unwrap()), [3, 1023]);
    }

    let error = chain(ram(Backing::Path(directory.path().join("no/such"))).unwrap_err());
    assert!(
        error.contains("no/such to back 4 MiB of RAM") && error.contains("No such file"),
        "{error}"
    );
}

#[test]
fn a_full_file_system_is_an_error_and_no_signal() {
    let directory = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(directory.path())
        .output()
        .is_ok_and(|output| output.status.success());
    if !mounted {
        eprintln!("NOT RUN: a file system of 1 MiB can not be mounted here (root can)");
        return;
    }
    let result = GuestRam::new(&RamConfig {
        share: true,
        prealloc: true,
        ..config(Backing::Path(directory.path().into()))
    });
    assert!(Command::new("umount").arg(directory.path()).status().unwrap().success());
    let error = chain(result.unwrap_err());
    assert!(
        error.contains("POPULATE_WRITE") && error.contains("room in the file system"),
        "{error}"
    );
}

/// Puts the size of the pool back, whatever happens.
struct Pool(String);

impl Pool {
    const PATH: &str = "/proc/sys/vm/nr_hugepages";
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::PATH, self.0.trim());
    }
}

#[test]
fn huge_pages_from_the_pool() {
    let pool = Pool(std::fs::read_to_string(Pool::PATH).unwrap());
    let _ = std::fs::write(Pool::PATH, "8");
    let free = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = free.lines().find(|line| line.starts_with("HugePages_Free")).unwrap();
    let free: u64 = free.split_whitespace().nth(1).unwrap().parse().unwrap();
    let huge = Backing::HugeTlb(2 << 20);

    let made = ram(huge.clone());
    if free < 2 {
        eprintln!("NOT RUN: there are {free} huge pages, and only root can make more");
    } else {
        works(&made.unwrap());
        let preallocated = RamConfig { prealloc: true, ..config(huge.clone()) };
        works(&GuestRam::new(&preallocated).unwrap());
        in_hugetlbfs();
    }
    // More than any pool has.
    let error =
        chain(GuestRam::new(&RamConfig { size: 1 << 40, ..config(huge.clone()) }).unwrap_err());
    assert!(
        error.contains("it takes 1536 free pages in") && error.contains("hugepages-2048kB"),
        "{error}"
    );

    let error = chain(GuestRam::new(&RamConfig { size: 3 << 20, ..config(huge) }).unwrap_err());
    assert!(error.contains("3 MiB") && error.contains("pages of 2 MiB"), "{error}");
    for odd in [0, 3 << 20, 1 << 22] {
        let error = chain(ram(Backing::HugeTlb(odd)).unwrap_err());
        assert!(error.contains("/sys/kernel/mm/hugepages"), "{error}");
    }
    drop(pool);
}

/// A directory of huge pages, and what is wrong with one.
fn in_hugetlbfs() {
    let directory = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "hugetlbfs", "-o", "pagesize=2M", "hugetlbfs"])
        .arg(directory.path())
        .output()
        .is_ok_and(|output| output.status.success());
    if !mounted {
        eprintln!("NOT RUN: hugetlbfs can not be mounted here (root can)");
        return;
    }
    let path = Backing::Path(directory.path().into());
    let made = [false, true].map(|share| {
        let ram = GuestRam::new(&RamConfig { share, ..config(path.clone()) });
        ram.inspect(|ram| {
            assert_eq!(ram.regions()[0].is_hugetlbfs(), Some(true));
            works(ram);
        })
        .map(drop)
    });
    let odd = GuestRam::new(&RamConfig { size: 3 << 20, ..config(path) }).map(drop);
    assert!(Command::new("umount").arg(directory.path()).status().unwrap().success());
    made.into_iter().for_each(|made| made.unwrap());
    assert!(matches!(odd, Err(Error::HugePages { page: 0x20_0000, .. })), "{odd:?}");
}

#[test]
fn preallocated_merged_and_huge() {
    for backing in [Backing::Anonymous, Backing::Shared] {
        let ram = GuestRam::new(&RamConfig { prealloc: true, ..config(backing) }).unwrap();
        assert_eq!(resident(&ram.regions()[0]), SIZE);
        works(&ram);
    }
    for huge_pages in [Some(false), Some(true)] {
        let merge = Path::new("/sys/kernel/mm/ksm").exists();
        let asked = RamConfig { merge, huge_pages, dump: false, ..config(Backing::Anonymous) };
        works(&GuestRam::new(&asked).unwrap());
    }
}

#[test]
fn touching_brings_all_pages_in_and_changes_none() {
    for backing in [Backing::Anonymous, Backing::Shared] {
        let ram = ram(backing).unwrap();
        ram.memory().write_slice(b"kept", GuestAddress(0x3000)).unwrap();
        sys::touch(&ram.regions()[0]);
        assert_eq!(resident(&ram.regions()[0]), SIZE);
        assert_eq!(pages(&ram), [3]);
        assert_eq!(ram.memory().read_obj::<[u8; 4]>(GuestAddress(0x3000)).unwrap(), *b"kept");
    }
}

#[test]
fn a_size_no_guest_can_have_is_an_error() {
    let error = chain(GuestRam::new(&RamConfig::new(5000)).unwrap_err());
    assert!(error.contains("5000 bytes of RAM can not be"), "{error}");
    let error = chain(GuestRam::new(&RamConfig::new(1 << 47)).unwrap_err());
    assert!(error.contains("128 TiB of RAM can not be"), "{error}");
}

#[test]
fn debug_shows_no_contents() {
    let ram = ram(Backing::Anonymous).unwrap();
    ram.memory().write_slice(&[0xa7; 64], GuestAddress(0)).unwrap();
    let mut own = PageSet::new();
    ram.take_own_writes(&mut own);
    assert_eq!(format!("{ram:?}"), "GuestRam({0: 4194304})");
    for text in [format!("{:?}", ram.memory()), format!("{:?}", ram.regions()), format!("{own:?}")]
    {
        for secret in ["167, 167", "a7a7", "a7, a7", "a7, 0xa7"] {
            assert!(!text.to_lowercase().contains(secret), "{text}");
        }
        assert!(text.len() < 1000, "{text}");
    }
}

#[test]
fn paged_out_memory_comes_back_and_none_is_locked() {
    let swap = std::fs::read_to_string("/proc/swaps").unwrap().lines().count() > 1;
    let directory = tempfile::tempdir().unwrap();
    let file = Backing::Path(directory.path().into());
    for (backing, goes) in [(Backing::Anonymous, swap), (Backing::Shared, swap), (file, true)] {
        let name = backing.to_string();
        let ram =
            GuestRam::new(&RamConfig { share: true, prealloc: true, ..config(backing) }).unwrap();
        let region = &ram.regions()[0];
        ram.memory().write_slice(&[0x5a; 1 << 20], GuestAddress(1 << 20)).unwrap();
        sys::advise(region, libc::MADV_PAGEOUT).unwrap();
        if goes {
            let left = resident(region);
            assert!(left < SIZE, "of {name} {left} bytes are left");
        } else {
            eprintln!("NOT RUN in full: without swap {name} can not be paged out (see swapon)");
        }
        assert_eq!(pages(&ram), (256..512).collect::<Vec<_>>());
        let mut back = vec![0; 1 << 20];
        ram.memory().read_slice(&mut back, GuestAddress(1 << 20)).unwrap();
        assert!(back.iter().all(|byte| *byte == 0x5a));
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    assert!(
        status.lines().any(|line| line.starts_with("VmLck:") && line.contains(" 0 kB")),
        "{status}"
    );
}
