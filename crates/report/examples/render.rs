//! Makes a page from runs, one JSON document a line: `render RUNS.json OUT.html`.

use medes_report::{Heading, page};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let text = std::fs::read_to_string(&args[1])?;
    let runs = text.lines().map(serde_json::from_str).collect::<Result<Vec<_>, _>>()?;
    let heading = Heading { title: "Medes: evaluation".to_owned(), origin: args.clone() };
    std::fs::write(&args[2], page(&heading, &runs))?;
    Ok(())
}
