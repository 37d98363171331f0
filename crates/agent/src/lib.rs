//! The dedup agent: the dedup and restore operations.

pub mod image;
