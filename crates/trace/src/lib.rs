//! Arrival traces: which function was called when.
//!
//! A trace is read as a stream, from the Azure Functions data sets of 2019 and 2021 or a plain
//! table, and comes out as arrivals in the order of their times ([`Trace::arrivals`]). What a
//! trace leaves open, such as the second inside a minute, is drawn from a seed: the same trace and
//! seed give the same arrivals, on every machine. What is wrong in a file is an error with file,
//! line and column, or repaired in a way that is written down and counted ([`Repairs`]).

#![forbid(unsafe_code)]

mod arrivals;
mod azure2019;
mod counts;
mod error;
mod events;
mod made;
mod mapping;
mod random;
mod sorter;
mod table;
mod trace;

pub use counts::{MinuteCounts, Trigger};
pub use error::{TraceError, What};
pub use made::{MadeFiles, Making, make};
pub use mapping::{Traits, map_functions};
pub use random::Random;
pub use trace::{
    Arrival, Arrivals, Format, Quantiles, Repairs, Trace, TraceFunction, TraceOptions,
};
