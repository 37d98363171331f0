//! What is shown of a long measurement while it runs: on a terminal one line per function that changes in place,
//! else a plain line for each step. All of it on standard error.

use std::collections::BTreeMap;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use medes_core::SandboxState;

use crate::output::megabytes;
use crate::wire::SandboxView;

/// The lines of all functions.
pub struct View {
    bars: Option<MultiProgress>,
}

impl View {
    /// A view on standard error.
    pub fn new() -> Self {
        let terminal = console_is_terminal();
        let bars = terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Self { bars }
    }

    /// Says something that is about no single function.
    pub fn say(&self, text: &str) {
        match &self.bars {
            Some(bars) => {
                let _ = bars.println(text);
            }
            None => eprintln!("{text}"),
        }
    }

    /// A line for one function, which has `requests` requests ahead of it.
    pub fn line(&self, name: &str, requests: usize) -> Line {
        let bar = self.bars.as_ref().map(|bars| {
            let style = ProgressStyle::with_template("{prefix:12.bold} {bar:16.cyan/dim} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = bars.add(ProgressBar::new(requests as u64).with_style(style));
            bar.set_prefix(name.to_owned());
            bar.set_message("waits");
            bar
        });
        Line {
            name: name.to_owned(),
            bar,
            step: String::new(),
            count: String::new(),
            states: String::new(),
        }
    }
}

fn console_is_terminal() -> bool {
    use std::io::IsTerminal;
    std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
}

/// One function's line.
pub struct Line {
    name: String,
    bar: Option<ProgressBar>,
    step: String,
    /// How often the step has been done, of how many times; empty if it is done once.
    count: String,
    states: String,
}

impl Line {
    /// A new step begins.
    pub fn step(&mut self, step: &str) {
        if self.bar.is_none() && self.step != step {
            eprintln!("{}: {step}", self.name);
        }
        step.clone_into(&mut self.step);
        self.count.clear();
        self.draw();
    }

    /// A step that is done many times begins again. Without a terminal it is said once.
    pub fn repeat(&mut self, step: &str, n: usize, of: usize) {
        self.step(step);
        self.count = format!(" {n}/{of}");
        self.draw();
    }

    /// `n` more requests have been answered.
    pub fn answered(&self, n: usize) {
        if let Some(bar) = &self.bar {
            bar.inc(n as u64);
        }
    }

    /// The function's sandboxes as they are now.
    pub fn sandboxes(&mut self, sandboxes: &[SandboxView]) {
        let states = summary(sandboxes);
        if states == self.states {
            return;
        }
        if self.bar.is_none() && self.count.is_empty() {
            eprintln!("{}: {states}", self.name);
        }
        self.states = states;
        self.draw();
    }

    /// Nothing more comes for this function.
    pub fn done(&mut self, text: &str) {
        if self.bar.is_none() {
            eprintln!("{}: {text}", self.name);
        }
        text.clone_into(&mut self.step);
        self.count.clear();
        self.draw();
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }

    fn draw(&self) {
        if let Some(bar) = &self.bar {
            let step = format!("{}{}", self.step, self.count);
            bar.set_message(format!("{step:22} {}", self.states));
        }
    }
}

/// `3 dedup, 1 warm, 7.4 MB`.
fn summary(sandboxes: &[SandboxView]) -> String {
    let mut counts: BTreeMap<SandboxState, usize> = BTreeMap::new();
    for s in sandboxes {
        *counts.entry(s.state).or_default() += 1;
    }
    let mut parts: Vec<_> = counts.iter().map(|(state, n)| format!("{n} {state}")).collect();
    if parts.is_empty() {
        return "no sandboxes".to_owned();
    }
    parts.push(megabytes(sandboxes.iter().map(|s| s.memory_total).sum()));
    parts.join(", ")
}
