//! Kernels, initrds and ACPI tables into guest RAM. (Being written.)
