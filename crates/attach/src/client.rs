//! Asking the holder, and starting one when there is none.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use crate::protocol::{
    Attached, Call, Dedup, DedupReport, Event, Reply, Request, RestoreReport, VERSION, Which,
};

/// How long a new holder may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Asking the holder failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It refuses, or something stands in the way.
    #[error("{message}")]
    Refused {
        /// A stable name, see [`Reply::Error`].
        code: String,
        /// The cause and the way out.
        message: String,
    },
    /// It could not be started.
    #[error("the process that holds attached memory could not be started: {0}; see {1}")]
    Start(io::Error, PathBuf),
    /// It can't be talked to.
    #[error("talking to the process that holds attached memory ({1}): {0}")]
    Talk(io::Error, PathBuf),
}

impl ClientError {
    /// A stable name for programs.
    #[must_use]
    pub fn code(&self) -> &str {
        match self {
            Self::Refused { code, .. } => code,
            Self::Start(..) | Self::Talk(..) => "Failed",
        }
    }
}

/// Where the holder is, and how one is started.
#[derive(Clone, Debug)]
pub struct Client {
    directory: PathBuf,
    program: PathBuf,
    arguments: Vec<String>,
}

impl Client {
    /// A client of the holder whose socket is in `directory`. `program` with `arguments` and
    /// `--dir DIRECTORY` runs [`crate::holder::run`].
    #[must_use]
    pub fn new(directory: PathBuf, program: PathBuf, arguments: Vec<String>) -> Self {
        Self { directory, program, arguments }
    }

    /// Puts something into the dedup state, or, as a dry run, finds out what that would save.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn dedup(&self, dedup: Dedup) -> Result<DedupReport, ClientError> {
        let stream = self.connect_or_start()?;
        self.ask(stream, Request::Dedup(dedup))
    }

    /// Brings groups back.
    ///
    /// # Errors
    /// [`ClientError`]; also when the only group that was named is not attached.
    pub fn restore(&self, which: Which, wait: bool) -> Result<Vec<RestoreReport>, ClientError> {
        match (self.connect(), which) {
            (Some(stream), which) => self.ask(stream, Request::Restore { which, wait }),
            (None, Which::All) => Ok(Vec::new()),
            (None, _) => Err(ClientError::Refused {
                code: "NotAttached".into(),
                message: "nothing is attached; `medes attach status` lists what is".into(),
            }),
        }
    }

    /// What is attached.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn status(&self) -> Result<Vec<Attached>, ClientError> {
        let Some(stream) = self.connect() else { return Ok(Vec::new()) };
        self.ask(stream, Request::Status)
    }

    /// What happened lately.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn events(&self) -> Result<Vec<Event>, ClientError> {
        let Some(stream) = self.connect() else { return Ok(Vec::new()) };
        self.ask(stream, Request::Events)
    }

    /// Calls `seen` for what happened lately and whatever happens until the holder ends, which it
    /// does when nothing is attached any more.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn watch(&self, mut seen: impl FnMut(&Event)) -> Result<(), ClientError> {
        let Some(mut stream) = self.connect() else { return Ok(()) };
        self.send(&mut stream, Request::Watch)?;
        for line in BufReader::new(stream).lines() {
            let line = line.map_err(|error| self.talk(error))?;
            let event = serde_json::from_str(&line).map_err(|error| self.talk(error.into()))?;
            seen(&event);
        }
        Ok(())
    }

    fn socket(&self) -> PathBuf {
        socket(&self.directory)
    }

    fn connect(&self) -> Option<UnixStream> {
        UnixStream::connect(self.socket()).ok()
    }

    fn connect_or_start(&self) -> Result<UnixStream, ClientError> {
        if let Some(stream) = self.connect() {
            return Ok(stream);
        }
        let log = self.directory.join("log");
        self.start(&log).map_err(|error| ClientError::Start(error, log.clone()))?;
        let until = Instant::now() + START_LIMIT;
        loop {
            match UnixStream::connect(self.socket()) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() > until => return Err(ClientError::Start(error, log)),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Starts a holder that outlives whoever started it. If another one is faster, it ends.
    fn start(&self, log: &Path) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        fs::set_permissions(&self.directory, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        let log = fs::File::options().create(true).append(true).open(log)?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).arg("--dir").arg(&self.directory);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // The terminal's signals are not for it.
        let mut child = command.current_dir("/").process_group(0).spawn()?;
        // It may well end before this process does.
        std::thread::spawn(move || child.wait());
        Ok(())
    }

    fn send(&self, stream: &mut UnixStream, request: Request) -> Result<(), ClientError> {
        let call = serde_json::to_string(&Call { version: VERSION, request });
        let call = call.map_err(|error| self.talk(error.into()))?;
        stream.write_all(format!("{call}\n").as_bytes()).map_err(|error| self.talk(error))
    }

    fn ask<T: DeserializeOwned>(
        &self,
        mut stream: UnixStream,
        request: Request,
    ) -> Result<T, ClientError> {
        self.send(&mut stream, request)?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).map_err(|error| self.talk(error))?;
        let reply = serde_json::from_str(&line).map_err(|error| self.talk(error.into()))?;
        match reply {
            Reply::Ok(value) => {
                serde_json::from_value(value).map_err(|error| self.talk(error.into()))
            }
            Reply::Error { code, message } => Err(ClientError::Refused { code, message }),
        }
    }

    fn talk(&self, error: io::Error) -> ClientError {
        ClientError::Talk(error, self.socket())
    }
}

/// The holder's socket in its directory.
pub(crate) fn socket(directory: &Path) -> PathBuf {
    directory.join("socket")
}
