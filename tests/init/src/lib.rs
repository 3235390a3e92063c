//! What the lab's two ends agree on: the frames between `xtask` and the agent in the lab's host.
//!
//! The package's binary is PID 1 in two places: of the *guests* under test, where the kernel command line's `keel.do=`
//! says what to exercise, and of the *lab host* (`keel.role=host`), where it loads the modules, mounts the share and runs
//! the agent that executes commands for `xtask`. Both are one static file, so that an initrd needs nothing else.
//!
//! ```
//! use keel_test_init::frame::{Frame, Kind};
//!
//! let sent = Frame::new(7, Kind::Output, b"hello".to_vec());
//! let mut wire = Vec::new();
//! sent.write_to(&mut wire)?;
//! assert_eq!(Frame::read_from(&mut wire.as_slice())?, Some(sent));
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! - [`frame`]: the frames and their payloads

#![forbid(unsafe_code)]

pub mod frame;
