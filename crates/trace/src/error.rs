//! What is wrong with a trace, and where.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// A trace can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A file can't be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}:{line}{}: {what}", path.display(), Column(*column))]
    Bad {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The column of the table, from 1; 0 if the whole line is meant.
        column: usize,
        /// What is wrong.
        what: Box<What>,
    },
    /// The file is no trace of a known format.
    #[error(
        "{}: no known trace format: the first line has to name the columns {}",
        path.display(),
        "HashOwner,HashApp,HashFunction,Trigger,1,2,.. or app,func,end_timestamp,duration or \
         time_ms,function[,duration_ms]"
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// There is nothing to replay.
    #[error("{}: the trace has no arrivals", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

impl TraceError {
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

struct Column(usize);

impl fmt::Display for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 > 0 { write!(f, ", column {}", self.0) } else { Ok(()) }
    }
}

/// What is wrong with a line.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum What {
    /// A column is missing from the header.
    #[error("there is no column {0}")]
    NoColumn(String),
    /// The line has another number of columns than the header.
    #[error("the header has {expected} columns, this line has {found}")]
    Width {
        /// Columns of the header.
        expected: usize,
        /// Columns of the line.
        found: usize,
    },
    /// A value is no number.
    #[error("{0:?} is no number")]
    NotANumber(String),
    /// A value is a number, but an impossible one.
    #[error("{value} is not possible for {name}: it must be from {least} to {most}")]
    Range {
        /// What it is the value of.
        name: &'static str,
        /// The value as it stands there.
        value: String,
        /// The least possible value.
        least: String,
        /// The greatest possible value.
        most: String,
    },
    /// A name is empty.
    #[error("the {0} is empty")]
    NoName(&'static str),
    /// The same minute twice in the header.
    #[error("minute {0} does not follow the one before it: the minutes must be consecutive")]
    Minutes(String),
    /// A line is absurdly long.
    #[error("the line is longer than {0} bytes")]
    TooLong(usize),
    /// Not UTF-8.
    #[error("the line is not text (UTF-8)")]
    NotText,
    /// A quoted field does not end.
    #[error("a quotation mark is not closed")]
    OpenQuote,
}
