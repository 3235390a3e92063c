//! A VMM. (Being written.)

fn main() {}
