//! CPU models. (Being written.)

/// A CPU model.
#[derive(Clone, Debug)]
pub struct CpuModel;
