//! Makes a trace: `cargo run --release --example make -- DIR FUNCTIONS MINUTES CALLS SEED`.

use std::path::Path;

use medes_trace::{Making, make};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let making = Making {
        functions: args[2].parse()?,
        minutes: args[3].parse()?,
        calls: args[4].parse()?,
        seed: args[5].parse()?,
    };
    println!("{:?}", make(Path::new(&args[1]), making)?);
    Ok(())
}
