//! `medes doctor`: what this host can do, what is missing, and what to change.

mod host;
mod kernel;
mod tools;

use clap::Args;
use serde::Serialize;
use serde_json::json;

use crate::commands::Global;
use crate::config::Config;
use crate::failure::{Failure, Outcome};
use crate::output::{Format, colours};

/// How a check came out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Something optional is absent.
    Note,
    /// The platform runs, but less well than it could.
    Warn,
    /// The platform can't run, or can't deduplicate.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What follows from it.
    pub consequence: Option<String>,
    /// What to change.
    pub remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        let found = found.into();
        Self { name, verdict: Verdict::Ok, found, consequence: None, remedy: None }
    }

    fn not(
        verdict: Verdict,
        name: &'static str,
        found: impl Into<String>,
        consequence: &str,
        remedy: &str,
    ) -> Self {
        let text = |s: &str| (!s.is_empty()).then(|| s.to_owned());
        let found = found.into();
        Self { name, verdict, found, consequence: text(consequence), remedy: text(remedy) }
    }
}

/// Check what this host can do: kernel, cgroups, memory, runtimes, tools.
#[derive(Debug, Args)]
pub struct DoctorCommand {
    #[command(flatten)]
    format: Format,
}

impl DoctorCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the configuration can't be read, or this host can't run the platform.
    pub fn run(self, global: &Global) -> Outcome {
        let (config, _) = global.load_config()?;
        let checks = all(&config);
        let worst = checks.iter().map(|c| c.verdict).max().unwrap_or(Verdict::Ok);
        let value = json!({ "verdict": worst, "checks": checks });
        self.format.print(&value, || human(&checks, colours()));
        if worst < Verdict::Fail {
            return Ok(());
        }
        Err(Failure::Platform("this host can't run the platform as it is; see FAIL above".into()))
    }
}

fn all(config: &Config) -> Vec<Check> {
    let mut checks = kernel::checks();
    checks.extend(host::checks(config));
    checks.extend(tools::checks(config));
    checks
}

fn human(checks: &[Check], colours: bool) -> String {
    let width = checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for check in checks {
        let (word, colour) = match check.verdict {
            Verdict::Ok => ("ok  ", "32"),
            Verdict::Note => ("-   ", "2"),
            Verdict::Warn => ("warn", "33"),
            Verdict::Fail => ("FAIL", "31"),
        };
        let word = if colours { format!("\x1b[{colour}m{word}\x1b[0m") } else { word.to_owned() };
        out.push_str(&format!("{word}  {:width$}  {}\n", check.name, check.found));
        let indent = " ".repeat(width + 8);
        if let Some(consequence) = &check.consequence {
            out.push_str(&format!("{indent}{consequence}\n"));
        }
        if let Some(remedy) = &check.remedy {
            out.push_str(&format!("{indent}-> {remedy}\n"));
        }
    }
    out
}

/// A file's text without the line's end, or nothing.
fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|s| s.trim().to_owned())
}

/// A file's text as a number.
fn read_number(path: &str) -> Option<u64> {
    read(path)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_that_is_not_well_says_what_follows() {
        for check in all(&Config::default()) {
            assert!(!check.found.is_empty(), "{check:?}");
            if check.verdict > Verdict::Note {
                assert!(check.consequence.is_some() && check.remedy.is_some(), "{check:?}");
            }
        }
    }

    #[test]
    fn the_way_out_is_shown_below_the_finding() {
        let checks = [
            Check::ok("kernel", "6.18"),
            Check::not(Verdict::Fail, "root", "uid 1000", "nothing works", "run it as root"),
        ];
        assert_eq!(
            human(&checks, false),
            "ok    kernel  6.18\n\
             FAIL  root    uid 1000\n              nothing works\n              -> run it as root\n"
        );
    }
}
