//! What commands and the holder say to each other: lines of JSON over a Unix stream socket, one
//! request a connection. The platform's API shows the same documents.

use serde::{Deserialize, Serialize};

use crate::target::Target;

/// Changed whenever the messages change.
pub const VERSION: u32 = 2;

/// One request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    /// The asker's protocol version.
    pub version: u32,
    /// What it wants.
    pub request: Request,
}

/// What can be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Put something into the dedup state. Answered by a [`DedupReport`].
    Dedup(Dedup),
    /// Bring groups back. Answered by a list of [`RestoreReport`].
    Restore {
        /// Which.
        which: Which,
        /// Answer when all memory is back, not as soon as they run.
        wait: bool,
    },
    /// What is attached. Answered by a list of [`Attached`].
    Status,
    /// What happened lately. Answered by a list of [`Event`].
    Events,
    /// What happened lately and what happens from now on: one [`Event`] a line, without end.
    Watch,
}

/// What is to be put into the dedup state, and how.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Dedup {
    /// What.
    pub target: Target,
    /// The dedup domain: base pages are shared within it only. One for each user unless set.
    pub domain: Option<String>,
    /// Make its pages a base snapshot for others that run the same program.
    pub base: bool,
    /// Find out what it would save; change nothing.
    pub dry_run: bool,
}

/// Which groups are meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Which {
    /// All of them.
    All,
    /// The one with this identifier.
    Id(String),
    /// The one that was attached so, or that the process belongs to.
    Target(Target),
}

/// What a dedup operation did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DedupReport {
    /// The group's identifier; none after a dry run.
    pub id: Option<String>,
    /// How many processes it has.
    pub processes: usize,
    /// Private memory of the processes that goes, bytes.
    pub private_bytes: u64,
    /// What is kept to bring it back, bytes.
    pub image_bytes: u64,
    /// Base pages kept for this group and others, bytes: what the operation added to them.
    pub base_bytes: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Pages equal to a base page.
    pub equal_pages: u64,
    /// Pages kept as a patch against a base page.
    pub patched_pages: u64,
    /// Pages kept compressed.
    pub unique_pages: u64,
    /// Pages, of all these, that were taken over from the image before: nobody has changed them since.
    pub reused_pages: u64,
    /// The dedup domain.
    pub domain: String,
    /// Reading and encoding, microseconds.
    pub encode_us: u64,
    /// Stopping and dropping, microseconds.
    pub commit_us: u64,
}

/// What a restore did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// The group's identifier.
    pub id: String,
    /// From the request until the processes ran, microseconds.
    pub run_us: u64,
    /// Why it failed. The processes were killed then: they could not go on.
    pub error: Option<String>,
}

/// Where a group is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its memory is being read and encoded.
    Deduping,
    /// It is frozen, without its memory.
    Dedup,
    /// It runs; its memory comes back.
    Restoring,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Deduping => "deduping",
            Self::Dedup => "dedup",
            Self::Restoring => "restoring",
        })
    }
}

/// A group that is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Its identifier, unique as long as the holder lives.
    pub id: String,
    /// What was attached.
    pub target: Target,
    /// Where it is.
    pub state: State,
    /// The program of its first process.
    pub program: String,
    /// The dedup domain.
    pub domain: String,
    /// Its processes.
    pub pids: Vec<i32>,
    /// Private memory that went, bytes.
    pub private_bytes: u64,
    /// What is kept to bring it back, bytes; base pages, which are shared, are not in it.
    pub image_bytes: u64,
    /// When it was attached, milliseconds since 1970.
    pub since_ms: u64,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, milliseconds since 1970.
    pub at_ms: u64,
    /// The group's identifier.
    pub id: String,
    /// What: `attached`, `dedup`, `stays`, `thawed`, `runs`, `restored`, `ended` or `killed`.
    pub what: String,
    /// More about it.
    pub detail: String,
}

/// An answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// What was asked for.
    Ok(serde_json::Value),
    /// Why not.
    Error {
        /// A stable name for programs: `NoSuchTarget`, `Untouchable`, `Paused`, `StaysWarm`,
        /// `Attached`, `NotAttached`, `Busy`, `Lost`, `BadRequest` or `Failed`.
        code: String,
        /// The cause and the way out.
        message: String,
    },
}
