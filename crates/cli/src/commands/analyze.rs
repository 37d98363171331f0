//! `medes analyze`: how much of one memory is in another.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use medes_bench::analysis::{self, Analysis};
use medes_bench::chart;

use super::bench::{Run, say};
use crate::failure::{Failure, Outcome};
use crate::output::table;

/// Study how much memory has in common: of example functions in sandboxes, with and without
/// address-space randomisation, or of any processes. Needs root.
#[derive(Debug, Args)]
pub struct AnalyzeCommand {
    #[command(flatten)]
    run: Run,
    /// Compare these processes instead; at least two.
    #[arg(long, value_name = "PID", conflicts_with = "functions",
          value_parser = clap::value_parser!(i32).range(1..))]
    pid: Vec<i32>,
    /// Write a page with charts.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl AnalyzeCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If a process can't be read, or a sandbox does not do what it should.
    pub fn run(self) -> Outcome {
        let analysis = match self.pid.len() {
            0 => {
                let (testbed, functions) = self.run.open()?;
                analysis::of_functions(&testbed, &functions, &say)?
            }
            1 => return Err(Failure::Usage("one process can't be compared; name two".into())),
            _ => analysis::of_processes(&self.pid)?,
        };
        if let Some(file) = &self.html {
            let page = chart::page(&analysis);
            std::fs::write(file, page).with_context(|| file.display().to_string())?;
        }
        self.run.publish(&analysis, || render(&analysis))?;
        Ok(())
    }
}

fn render(analysis: &Analysis) -> String {
    let percent = |share: &f64| format!("{:.0} %", share * 100.0);
    let sizes: Vec<String> = analysis.chunk_sizes.iter().map(|s| format!(">{s} B")).collect();
    let mut header = vec!["", ">MB", ">ZERO"];
    header.extend(sizes.iter().map(String::as_str));
    header.push(">OTHERS");
    let mut out = String::new();
    for study in &analysis.studies {
        let rows = study.memories.iter().map(|m| {
            let mut row =
                vec![m.name.clone(), format!("{:.1}", m.bytes as f64 / 1e6), percent(&m.zero)];
            row.extend(m.by_chunk_size.iter().map(percent));
            row.push(percent(&m.against_others));
            row
        });
        let mut mean = vec!["mean".to_owned(), String::new(), String::new()];
        mean.extend(study.mean_by_chunk_size.iter().map(percent));
        mean.push(percent(&study.mean_across));
        out.push_str(&format!("{}\n", study.setting));
        out.push_str(&table(&header, rows.chain([mean])));
        out.push('\n');
    }
    let what = if analysis.studies.len() > 1 {
        "in another sandbox of the same function, by chunk size; OTHERS: in one of another \
         function, mean"
    } else {
        "in the other processes, by chunk size; OTHERS: in one of the others, mean"
    };
    out.push_str(&format!(
        "The share of private memory, without pages of zeros (ZERO), that is also {what}.\n"
    ));
    out
}
