//! PID 1 of the lab's guests. (Being written.)

fn main() {}
