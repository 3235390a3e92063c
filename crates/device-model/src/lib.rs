//! What a device is: I/O traits, lines, clocks, saved state, and the board that dispatches. (Being written.)
