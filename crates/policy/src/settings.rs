//! What an operator sets: one policy by its name, with the few figures that it has.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::adaptive::Adaptive;
use crate::decision::PolicyConfig;
use crate::objective::{Form, Objective};
use crate::stats::FunctionSettings;

/// The policies there are, by the names that operators choose them by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyName {
    /// Dedup after the idle period, always; see [`crate::Simple`].
    #[default]
    Periods,
    /// Medes with a latency target (P1), weighted by the requests that are served.
    Latency,
    /// Medes with a memory budget (P2), divided by marginal benefit.
    Memory,
    /// P1 by the paper's equations.
    LatencyPaper,
    /// P2 by the paper's equations.
    MemoryPaper,
    /// Fixed keep-alive, never dedup; see [`crate::FixedKeepAlive`].
    Fixed,
    /// The hybrid histogram policy; see [`crate::Adaptive`].
    Adaptive,
    /// See [`crate::GreedyDual`].
    GreedyDual,
}

impl PolicyName {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Periods,
        Self::Latency,
        Self::Memory,
        Self::LatencyPaper,
        Self::MemoryPaper,
        Self::Fixed,
        Self::Adaptive,
        Self::GreedyDual,
    ];

    /// The name as configuration, commands and answers have it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Periods => "periods",
            Self::Latency => "latency",
            Self::Memory => "memory",
            Self::LatencyPaper => "latency-paper",
            Self::MemoryPaper => "memory-paper",
            Self::Fixed => "fixed",
            Self::Adaptive => "adaptive",
            Self::GreedyDual => "greedy-dual",
        }
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for PolicyName {
    type Err = BadSetting;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = BadSetting {
            setting: "policy",
            message: "periods, latency, memory, latency-paper, memory-paper, fixed, adaptive or \
                      greedy-dual",
        };
        Self::ALL.into_iter().find(|name| name.as_str() == s).ok_or(bad)
    }
}

/// A policy and its figures. Each policy uses those that it knows of. Periods are milliseconds.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicySettings {
    /// Which policy decides.
    pub name: PolicyName,
    /// The latency target: the multiple of a warm startup that the mean startup of requests to
    /// existing sandboxes may be. The paper's evaluation uses 2.5.
    pub alpha: f64,
    /// The memory budget of all sandboxes, bytes; 0 means what the node has.
    pub budget: u64,
    /// Warm without a request for this long: dedup, if the policy says so.
    pub idle_ms: u64,
    /// Warm without a request for this long: not any longer.
    pub keep_alive_ms: u64,
    /// Dedup for this long: purge.
    pub keep_dedup_ms: u64,
    /// The share of a node's memory that a policy which deduplicates keeps free ahead of time,
    /// percent.
    pub headroom_percent: u8,
}

impl Default for PolicySettings {
    /// The paper's periods and target: idle 60 s, keep-alive 10 min, keep-dedup 15 min, 2.5.
    fn default() -> Self {
        Self {
            name: PolicyName::default(),
            alpha: 2.5,
            budget: 0,
            idle_ms: 60_000,
            keep_alive_ms: 600_000,
            keep_dedup_ms: 900_000,
            headroom_percent: 10,
        }
    }
}

/// A setting has a value that makes no sense.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{setting}: {message}")]
pub struct BadSetting {
    /// Which.
    pub setting: &'static str,
    /// What it has to be.
    pub message: &'static str,
}

fn is(fits: bool, setting: &'static str, message: &'static str) -> Result<(), BadSetting> {
    if fits { Ok(()) } else { Err(BadSetting { setting, message }) }
}

/// No period is longer, milliseconds: a year.
const LONGEST_MS: u64 = 365 * 86_400_000;

fn check_alpha(alpha: f64) -> Result<(), BadSetting> {
    is((1.0..=1e6).contains(&alpha), "alpha", "1 or more: a multiple of a warm startup")
}

fn check_period(setting: &'static str, ms: u64) -> Result<(), BadSetting> {
    is(ms <= LONGEST_MS, setting, "at most a year")
}

impl PolicySettings {
    /// Whether every figure makes sense.
    ///
    /// # Errors
    /// Names the first that does not.
    pub fn check(&self) -> Result<(), BadSetting> {
        check_alpha(self.alpha)?;
        check_period("idle_ms", self.idle_ms)?;
        check_period("keep_alive_ms", self.keep_alive_ms)?;
        check_period("keep_dedup_ms", self.keep_dedup_ms)?;
        is(self.headroom_percent <= 50, "headroom_percent", "at most 50")
    }

    /// The policy that these settings mean.
    #[must_use]
    pub fn config(&self) -> PolicyConfig {
        let Self { alpha, budget, idle_ms, keep_alive_ms, keep_dedup_ms, .. } = *self;
        let medes = |objective, form| PolicyConfig::Medes {
            objective,
            form,
            idle_ms,
            keep_alive_ms,
            keep_dedup_ms,
        };
        match self.name {
            PolicyName::Periods => PolicyConfig::Simple { idle_ms, keep_alive_ms, keep_dedup_ms },
            PolicyName::Latency => medes(Objective::Latency { alpha }, Form::Served),
            PolicyName::Memory => medes(Objective::Memory { budget }, Form::Served),
            PolicyName::LatencyPaper => medes(Objective::Latency { alpha }, Form::Paper),
            PolicyName::MemoryPaper => medes(Objective::Memory { budget }, Form::Paper),
            PolicyName::Fixed => PolicyConfig::FixedKeepAlive { keep_alive_ms },
            PolicyName::Adaptive => PolicyConfig::Adaptive(Adaptive::default()),
            PolicyName::GreedyDual => PolicyConfig::GreedyDual,
        }
    }
}

impl FunctionSettings {
    /// Whether every figure makes sense.
    ///
    /// # Errors
    /// Names the first that does not.
    pub fn check(&self) -> Result<(), BadSetting> {
        self.alpha.map_or(Ok(()), check_alpha)?;
        is(self.budget != Some(0), "budget", "more than 0 bytes, or not set")?;
        for (setting, period) in [
            ("idle_ms", self.idle_ms),
            ("keep_alive_ms", self.keep_alive_ms),
            ("keep_dedup_ms", self.keep_dedup_ms),
        ] {
            period.map_or(Ok(()), |ms| check_period(setting, ms))?;
        }
        let priority = self.priority.unwrap_or(1.0);
        is((1e-3..=1e6).contains(&priority), "priority", "from 0.001 to 1000000; 1 is usual")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_reads_back_and_means_a_policy() {
        for name in PolicyName::ALL {
            let settings = PolicySettings { name, ..PolicySettings::default() };
            settings.check().unwrap();
            assert_eq!(name.as_str().parse(), Ok(name));
            let dedups = settings.config().build().dedups();
            let never = [PolicyName::Fixed, PolicyName::Adaptive, PolicyName::GreedyDual];
            assert_eq!(dedups, !never.contains(&name), "{name}");
        }
    }

    #[test]
    fn a_name_that_is_none_is_told_which_there_are() {
        let message = "lru".parse::<PolicyName>().unwrap_err().to_string();
        assert!(PolicyName::ALL.iter().all(|name| message.contains(name.as_str())), "{message}");
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (settings, setting) in [
            (PolicySettings { alpha: 0.5, ..PolicySettings::default() }, "alpha"),
            (PolicySettings { alpha: f64::NAN, ..PolicySettings::default() }, "alpha"),
            (PolicySettings { idle_ms: u64::MAX, ..PolicySettings::default() }, "idle_ms"),
            (PolicySettings { headroom_percent: 60, ..PolicySettings::default() }, "headroom"),
        ] {
            let message = settings.check().unwrap_err().to_string();
            assert!(message.starts_with(setting), "{message}");
        }
        for settings in [
            FunctionSettings { priority: Some(0.0), ..FunctionSettings::default() },
            FunctionSettings { budget: Some(0), ..FunctionSettings::default() },
            FunctionSettings { alpha: Some(f64::INFINITY), ..FunctionSettings::default() },
        ] {
            assert!(settings.check().is_err(), "{settings:?}");
        }
    }
}
