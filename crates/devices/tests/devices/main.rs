//! What holds for every device, and for every state one has ever been saved in.

mod cases;
mod contract;
mod golden;
mod mutate;
mod ops;
