//! What holds for every device, and for every state one has ever been saved in.
#![allow(clippy::unwrap_used, reason = "all of it is tests")]

mod cases;
mod contract;
mod golden;
mod mutate;
mod ops;
