//! The project's own commands. (Being written.)

fn main() {}
