//! Small hand-made guests, assembled at build time from readable source. (Being written.)
