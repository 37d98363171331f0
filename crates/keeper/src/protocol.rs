//! What the daemon and the keeper say to each other: frames over a Unix stream socket.
//!
//! A frame is a length (four bytes, little endian) and that many bytes of postcard. Descriptors
//! are not sent: both sides run as root on one machine and take what they need from the other with
//! `pidfd_getfd(2)`, named by process and number.

use bytes::Bytes;
use medes_agent::view::SpaceView;
use medes_core::SandboxId;
use medes_runtime::Request;
use medes_sandbox::SandboxSpec;
use medes_store::Extent;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Changed whenever the messages change: a daemon does not talk to a keeper of another version.
pub const VERSION: u32 = 9;

/// The longest frame, bytes: a request's payload and its head.
const MAX_FRAME: u32 = 16 * 1024 * 1024;

/// From the daemon: a numbered command.
#[derive(Debug, Serialize, Deserialize)]
pub struct Call {
    /// The answer carries the same number.
    pub number: u64,
    /// What to do.
    pub command: Command,
}

/// What the daemon may ask.
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// The first message: who calls, and where the page store's memory file is. If another daemon
    /// was there before, everything that it left unfinished is put right before this is answered.
    Hello {
        /// The daemon's protocol version.
        version: u32,
        /// The daemon's process.
        pid: i32,
        /// The memory file's descriptor in that process; `None` to take over the one that the
        /// keeper has.
        store: Option<i32>,
    },
    /// Tell of all sandboxes.
    List,
    /// The descriptors that [`Command::List`] was answered with have been taken.
    Taken,
    /// Make a sandbox and wait until its runtime asks for work.
    Start(Box<Start>),
    /// Hand a request to a sandbox and wait for the answer.
    Invoke {
        /// The sandbox.
        sandbox: SandboxId,
        /// The request.
        request: Request,
    },
    /// Kill a sandbox, in whatever state it is.
    Kill {
        /// The sandbox.
        sandbox: SandboxId,
    },
    /// Wait a little until a sandbox that has answered asks for its next request.
    Idle {
        /// The sandbox.
        sandbox: SandboxId,
    },
    /// Say what had better stay of a sandbox that is to be deduplicated.
    Residents {
        /// The sandbox.
        sandbox: SandboxId,
        /// How long putting the rest of its working set back may take, microseconds.
        target_us: u64,
        /// How much memory that may take which patches would not, bytes.
        most: u64,
    },
    /// Look whether an image can be read that is to be held soon.
    Examine {
        /// The sandbox.
        sandbox: SandboxId,
        /// Where the image lies in the page store.
        image: Extent,
    },
    /// Take hold of what brings a frozen sandbox's memory back, before that memory is dropped.
    Hold(Hold),
    /// Let go of it: the memory has not been dropped after all.
    Release {
        /// The sandbox.
        sandbox: SandboxId,
    },
    /// Some of the memory has not been dropped after all, and is not watched.
    Left {
        /// The sandbox.
        sandbox: SandboxId,
        /// For each process of the image, in order: which ranges.
        ranges: Vec<Vec<Range<u64>>>,
    },
    /// Bring back, as it is touched, what has been dropped of a sandbox that a request takes back
    /// while its memory is being dropped. The daemon lets it run.
    TakeBack {
        /// The sandbox.
        sandbox: SandboxId,
        /// For each process of the image, in order: what has not been dropped.
        left: Vec<Vec<Range<u64>>>,
    },
    /// Let a dedup sandbox run again, and bring its memory back as it is touched.
    Restore {
        /// The sandbox.
        sandbox: SandboxId,
        /// Bring back in the background what nobody touched, if the sandbox is used often.
        fill: bool,
        /// Put the working set back before it runs; else that follows with the next request.
        prefetch: bool,
        /// Hand this to the runtime before it runs; [`Command::Collect`] follows.
        request: Option<Request>,
    },
    /// Wait for the answer to the request that came with the newest restore.
    Collect {
        /// The sandbox.
        sandbox: SandboxId,
    },
    /// Bring all memory of a running sandbox back now, if some is still away, and watch it no
    /// longer.
    Complete {
        /// The sandbox.
        sandbox: SandboxId,
    },
    /// Stop serving the memory of a frozen sandbox that was restored before, and say what of its
    /// image is still its own.
    Suspend {
        /// The sandbox.
        sandbox: SandboxId,
    },
    /// Serve it on: it was not deduplicated after all.
    Resume {
        /// The sandbox.
        sandbox: SandboxId,
    },
    /// Kill all sandboxes and exit.
    Stop,
}

/// What brings a sandbox's memory back.
#[derive(Debug, Serialize, Deserialize)]
pub struct Hold {
    /// The sandbox.
    pub sandbox: SandboxId,
    /// Where its image lies in the page store.
    pub image: Extent,
    /// For each process of the image, in order: the daemon's descriptor of the userfaultfd.
    pub userfaults: Vec<i32>,
    /// For each process, what was written to since the restore before of what that image has, if
    /// there was one.
    pub written: Vec<Vec<Range<u64>>>,
    /// For each process, what stays and is not in the image.
    pub residents: Vec<Vec<Range<u64>>>,
}

/// How to make a sandbox.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// Its identity.
    pub sandbox: SandboxId,
    /// What it is made of.
    pub spec: SandboxSpec,
    /// The port of the Runtime API on the sandbox's loopback.
    pub port: u16,
    /// Where its function's log is kept.
    pub log: PathBuf,
    /// How large that log may get, bytes.
    pub log_bytes: u64,
    /// Names the working set that this sandbox shares with others of the same layout.
    pub working_set: u64,
    /// How long the start may take if the daemon does not live to see its end, milliseconds.
    pub limit_ms: u64,
    /// What the daemon wants to know of the sandbox when it has forgotten everything else.
    pub label: Vec<u8>,
}

/// A sandbox, as a new daemon is told of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Listed {
    /// Its identity.
    pub sandbox: SandboxId,
    /// What the daemon that started it had to say of it ([`Start::label`]).
    pub label: Vec<u8>,
    /// Whether it starts or serves a request, for nobody any more; [`Message::Idle`] follows.
    pub busy: bool,
    /// Where its memory is.
    pub memory: Whereabouts,
}

/// Where a sandbox's memory is.
#[derive(Debug, Serialize, Deserialize)]
pub enum Whereabouts {
    /// Where it belongs.
    Present,
    /// Away; the sandbox is frozen.
    Away(Holding),
    /// On its way back, or back and watched, since the restore of this number.
    Returning(u64, Holding),
}

/// What the keeper has of a sandbox.
#[derive(Debug, Serialize, Deserialize)]
pub struct Holding {
    /// Where its image lies in the page store.
    pub image: Extent,
    /// For each process of the image, in order: the keeper's descriptor of the userfaultfd, good
    /// until [`Command::Taken`]. Empty if there are others by now.
    pub userfaults: Vec<i32>,
}

/// From the keeper.
#[derive(Debug, Serialize, Deserialize)]
pub enum Message {
    /// The answer to a call.
    Reply {
        /// The call's number.
        number: u64,
        /// The answer.
        reply: Reply,
    },
    /// All memory of a sandbox is back, after the restore with this number.
    Filled {
        /// The sandbox.
        sandbox: SandboxId,
        /// The restore's number ([`Restored::number`]).
        number: u64,
        /// Whether it is watched further, so that the sandbox's next dedup is cheap
        /// ([`Command::Suspend`]). The image has to stay as long.
        watched: bool,
    },
    /// A sandbox that was busy for nobody any more has come to its end, and waits for requests.
    Idle {
        /// The sandbox.
        sandbox: SandboxId,
    },
    /// A sandbox ended while nobody waited for it.
    Ended {
        /// The sandbox.
        sandbox: SandboxId,
        /// How.
        how: Ending,
    },
}

/// Answers to calls.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// It is done.
    Done,
    /// It can't be done, and nothing has changed.
    Refused(String),
    /// To [`Command::Hello`].
    Hello {
        /// The keeper's protocol version.
        version: u32,
        /// The keeper's process.
        pid: i32,
        /// The memory file's descriptor in that process.
        store: i32,
        /// The name of the cgroups that it uses.
        cgroup: String,
    },
    /// To [`Command::List`].
    Listed(Vec<Listed>),
    /// To [`Command::Start`]: what came of it.
    Started(Started),
    /// To [`Command::Invoke`] and [`Command::Collect`].
    Answered {
        /// The answer.
        answer: Answer,
        /// What memory has come back since the newest restore, if some is on its way.
        returned: Returned,
    },
    /// To [`Command::Residents`]: for each process of the sandbox, by process id.
    Residents(Vec<Vec<Range<u64>>>),
    /// To [`Command::Restore`] and [`Command::TakeBack`].
    Restored(Restored),
    /// To [`Command::Suspend`]: for each process of the image.
    Suspended(Vec<SpaceView>),
}

/// What came of a start.
#[derive(Debug, Serialize, Deserialize)]
pub enum Started {
    /// The runtime waits for the first request.
    Ready,
    /// The runtime reported that it can't initialise; the sandbox is gone.
    InitError(Bytes),
    /// The process ended before it asked for work.
    Ended(Ending),
    /// The sandbox could not be made.
    Failed(String),
}

/// What a sandbox answered to a request.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The function's answer.
    Response(Bytes),
    /// The function's error document.
    Error(Bytes),
    /// The answer was too long and was not taken; its length, bytes.
    TooLarge(u64),
    /// The process ended first.
    Ended(Ending),
}

/// How memory came back since a restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Returned {
    /// Pages put back because they belong to the function's working set.
    pub prefetched: u64,
    /// Page faults answered.
    pub faults: u64,
    /// Pages put back for them.
    pub pages: u64,
}

/// What a restore did.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Restored {
    /// The restore's number; no other restore of this keeper has the same.
    pub number: u64,
    /// Pages put back before the sandbox ran.
    pub pages: u64,
    /// Putting pages back, microseconds.
    pub pages_us: u64,
    /// Letting the sandbox run, microseconds.
    pub thaw_us: u64,
}

/// How a sandbox's first process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// Such as `exit status 1` or `signal: killed`.
    pub how: String,
    /// Whether the kernel killed it for its memory limit.
    pub out_of_memory: bool,
}

/// Writes one frame.
///
/// # Errors
/// When the connection fails or the message is too long.
pub async fn write<T: Serialize>(
    to: &mut (impl AsyncWrite + Unpin),
    message: &T,
) -> io::Result<()> {
    let frame = encode(message)?;
    to.write_all(&frame).await
}

/// A message as one frame, ready to be written.
///
/// # Errors
/// When the message is too long.
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let frame = postcard::to_extend(message, vec![0; 4]).map_err(io::Error::other)?;
    seal(frame)
}

fn seal(mut frame: Vec<u8>) -> io::Result<Vec<u8>> {
    let length = u32::try_from(frame.len() - 4).ok().filter(|l| *l <= MAX_FRAME);
    let length = length.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "a message is longer than 16 MiB")
    })?;
    frame[..4].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

/// Reads one frame; `None` at the connection's end.
///
/// # Errors
/// When the connection fails or what arrives is no message.
pub async fn read<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let length = u32::from_le_bytes(length);
    if length > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame is longer than 16 MiB"));
    }
    let mut frame = vec![0; length as usize];
    from.read_exact(&mut frame).await?;
    let message = postcard::from_bytes(&frame);
    message.map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}
