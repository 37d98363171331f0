//! The medes command.

fn main() {}
