//! The daemon's handle of the keeper: starts it, calls it, hears from it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command as OsCommand, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use medes_core::SandboxId;
use medes_memory::descriptor::ProcessHandle;
use medes_store::Extent;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use crate::protocol::{self, Call, Command, Ending, Holding, Listed, Message, Reply, Whereabouts};

/// What goes wrong between daemon and keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The keeper's program could not be started.
    #[error("starting the keeper: {0}")]
    Spawn(io::Error),
    /// No answer at the keeper's socket.
    #[error("the keeper does not answer at {socket}: {error}; its own log is {log}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The keeper's log file.
        log: PathBuf,
        /// The last error.
        error: io::Error,
    },
    /// Something of the keeper's can't be taken over.
    #[error("taking over the keeper's descriptors: {error}")]
    Take {
        /// What the kernel said.
        error: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the keeper is lost")]
    Lost,
    /// The keeper refused.
    #[error("{0}")]
    Refused(String),
    /// The keeper answered something else than was asked.
    #[error("the keeper speaks another version of the protocol")]
    Protocol,
}

type Waiting = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Reply>>>>>;

/// What a keeper tells unasked.
#[derive(Debug)]
pub enum Unasked {
    /// All memory of a sandbox is back, after the restore with this number.
    Filled {
        /// The sandbox.
        sandbox: SandboxId,
        /// The restore's number.
        number: u64,
        /// Whether it is watched further, for which the image has to stay.
        watched: bool,
    },
    /// A sandbox that was busy for an earlier daemon ([`Inherited::busy`]) has come to its end.
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

/// What a keeper hands over to a new daemon.
#[derive(Debug)]
pub struct Inheritance {
    /// The page store's memory file.
    pub store: OwnedFd,
    /// The name of the cgroups that the keeper uses.
    pub cgroup: String,
    /// Every sandbox.
    pub sandboxes: Vec<Inherited>,
}

/// A sandbox that an earlier daemon started.
#[derive(Debug)]
pub struct Inherited {
    /// Its identity.
    pub sandbox: SandboxId,
    /// What that daemon had to say of it ([`Start::label`](crate::protocol::Start::label)).
    pub label: Vec<u8>,
    /// Whether it starts or serves a request, for nobody any more; [`Unasked::Idle`] follows.
    pub busy: bool,
    /// What its memory depends on; `None` if it has all of its own.
    pub memory: Option<InheritedMemory>,
}

/// What a sandbox's memory depends on.
#[derive(Debug)]
pub struct InheritedMemory {
    /// Where its image lies in the page store.
    pub image: Extent,
    /// For each process of the image, in order, its userfaultfd; empty if they are not the same
    /// any more.
    pub userfaults: Vec<OwnedFd>,
    /// The number of the restore since which it runs; `None` if it is frozen, its memory away.
    pub restore: Option<u64>,
}

/// How long a keeper may take to hand over. It waits for the end of the daemon before, which may
/// have a lot of memory to give back.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(15);

/// A connection to a running keeper. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Keeper {
    calls: mpsc::UnboundedSender<Vec<u8>>,
    waiting: Waiting,
    number: Arc<std::sync::atomic::AtomicU64>,
    pid: i32,
}

impl Keeper {
    /// Starts a keeper process and connects to it. `news` hears what nobody waits for; it closes
    /// when the connection is lost.
    ///
    /// # Errors
    /// When the process can't be started or does not answer.
    pub async fn launch(
        program: &Path,
        arguments: &[String],
        socket: &Path,
        log: &Path,
        store: BorrowedFd<'_>,
        news: mpsc::UnboundedSender<Unasked>,
    ) -> Result<Self, KeeperError> {
        let output = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .map_err(KeeperError::Spawn)?;
        let errors = output.try_clone().map_err(KeeperError::Spawn)?;
        let mut child = OsCommand::new(program)
            .args(arguments)
            .arg("--socket")
            .arg(socket)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            // Ctrl-C at the daemon's terminal is not meant for the keeper.
            .process_group(0)
            .spawn()
            .map_err(KeeperError::Spawn)?;
        let connected = Self::connect(socket, log, Some(store), news).await;
        let connected = connected.map(|(keeper, ..)| keeper);
        if connected.is_err() {
            let _ = child.kill();
        }
        // Reaped when it ends, which is after the daemon in most cases.
        std::thread::spawn(move || child.wait());
        connected
    }

    /// Takes over a keeper whose daemon is gone: connects, and has the keeper tell of everything
    /// that it holds. `news` hears of what happens from then on.
    ///
    /// # Errors
    /// When it does not answer in time, or speaks another version of the protocol.
    pub async fn take_over(
        socket: &Path,
        log: &Path,
        news: mpsc::UnboundedSender<Unasked>,
    ) -> Result<(Self, Inheritance), KeeperError> {
        let slow = || KeeperError::Connect {
            socket: socket.to_owned(),
            log: log.to_owned(),
            error: io::ErrorKind::TimedOut.into(),
        };
        let taken = async {
            let (keeper, store, cgroup) = Self::connect(socket, log, None, news).await?;
            let Reply::Listed(sandboxes) = keeper.call(Command::List).await? else {
                return Err(KeeperError::Protocol);
            };
            let taking = |error| KeeperError::Take { error };
            let process = ProcessHandle::open(keeper.pid).map_err(taking)?;
            let store = process.take_descriptor(store).map_err(taking)?;
            let sandboxes = sandboxes.into_iter().map(|s| inherit(&process, s)).collect();
            keeper.order(Command::Taken).await?;
            Ok((keeper, Inheritance { store, cgroup, sandboxes }))
        };
        tokio::time::timeout(TAKE_OVER_LIMIT, taken).await.unwrap_or_else(|_| Err(slow()))
    }

    /// Connects to a keeper that is running or about to, and introduces the daemon. Also returns
    /// the keeper's descriptor of the page store and the name of its cgroups.
    async fn connect(
        socket: &Path,
        log: &Path,
        store: Option<BorrowedFd<'_>>,
        news: mpsc::UnboundedSender<Unasked>,
    ) -> Result<(Self, i32, String), KeeperError> {
        let mut tries = 0;
        let stream = loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => break stream,
                Err(_) if tries < 300 => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => {
                    let (socket, log) = (socket.to_owned(), log.to_owned());
                    return Err(KeeperError::Connect { socket, log, error });
                }
            }
        };
        let mut keeper = Self::over(stream, news);
        let hello = Command::Hello {
            version: protocol::VERSION,
            pid: std::process::id() as i32,
            store: store.map(|store| store.as_raw_fd()),
        };
        match keeper.call(hello).await? {
            Reply::Hello { version: protocol::VERSION, pid, store, cgroup } => {
                keeper.pid = pid;
                Ok((keeper, store, cgroup))
            }
            Reply::Refused(why) => Err(KeeperError::Refused(why)),
            _ => Err(KeeperError::Protocol),
        }
    }

    fn over(stream: UnixStream, news: mpsc::UnboundedSender<Unasked>) -> Self {
        let (mut from, mut to) = stream.into_split();
        let (calls, mut queue) = mpsc::unbounded_channel::<Vec<u8>>();
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        tokio::spawn(async move {
            while let Some(frame) = queue.recv().await {
                if tokio::io::AsyncWriteExt::write_all(&mut to, &frame).await.is_err() {
                    break;
                }
            }
        });
        let replies = Arc::clone(&waiting);
        tokio::spawn(async move {
            loop {
                match protocol::read::<Message>(&mut from).await {
                    Ok(Some(Message::Reply { number, reply })) => {
                        let waiter = lock(&replies).as_mut().and_then(|w| w.remove(&number));
                        if let Some(waiter) = waiter {
                            let _ = waiter.send(reply);
                        }
                    }
                    Ok(Some(Message::Ended { sandbox, how })) => {
                        let _ = news.send(Unasked::Ended { sandbox, how });
                    }
                    Ok(Some(Message::Idle { sandbox })) => {
                        let _ = news.send(Unasked::Idle { sandbox });
                    }
                    Ok(Some(Message::Filled { sandbox, number, watched })) => {
                        let _ = news.send(Unasked::Filled { sandbox, number, watched });
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::error!(%error, "reading from the keeper");
                        break;
                    }
                }
            }
            // Everybody who waits learns that no answer comes, and nobody waits from now on.
            lock(&replies).take();
        });
        Self { calls, waiting, number: Arc::default(), pid: 0 }
    }

    /// The keeper's process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a command and waits for the answer.
    ///
    /// # Errors
    /// [`KeeperError::Lost`] when the connection breaks.
    pub async fn call(&self, command: Command) -> Result<Reply, KeeperError> {
        self.send(command)?.await.map_err(|_| KeeperError::Lost)
    }

    /// Sends a command and waits for the answer, on a thread that may block.
    ///
    /// # Errors
    /// [`KeeperError::Lost`] when the connection breaks.
    pub fn call_blocking(&self, command: Command) -> Result<Reply, KeeperError> {
        self.call_blocking_while(command, || {})
    }

    /// As [`Keeper::call_blocking`]; does something else while the keeper works.
    ///
    /// # Errors
    /// As [`Keeper::call_blocking`]. If the command can't be sent nothing else is done either.
    pub fn call_blocking_while(
        &self,
        command: Command,
        meanwhile: impl FnOnce(),
    ) -> Result<Reply, KeeperError> {
        let answer = self.send(command)?;
        meanwhile();
        answer.blocking_recv().map_err(|_| KeeperError::Lost)
    }

    /// Like [`Keeper::call`], for commands that are answered with [`Reply::Done`].
    ///
    /// # Errors
    /// [`KeeperError::Refused`] with the keeper's reason, or that the connection broke.
    pub async fn order(&self, command: Command) -> Result<(), KeeperError> {
        done(self.call(command).await?)
    }

    /// Like [`Keeper::order`], on a thread that may block.
    ///
    /// # Errors
    /// As [`Keeper::order`].
    pub fn order_blocking(&self, command: Command) -> Result<(), KeeperError> {
        done(self.call_blocking(command)?)
    }

    fn send(&self, command: Command) -> Result<oneshot::Receiver<Reply>, KeeperError> {
        let number = self.number.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let frame = protocol::encode(&Call { number, command })
            .map_err(|e| KeeperError::Refused(e.to_string()))?;
        let (answer, answered) = oneshot::channel();
        lock(&self.waiting).as_mut().ok_or(KeeperError::Lost)?.insert(number, answer);
        self.calls.send(frame).map_err(|_| KeeperError::Lost)?;
        Ok(answered)
    }
}

/// Takes what the keeper says it has of a sandbox.
fn inherit(keeper: &ProcessHandle, listed: Listed) -> Inherited {
    let take = |holding: Holding, restore| {
        let userfaults = holding.userfaults.iter().map(|number| keeper.take_descriptor(*number));
        // Without them the next dedup costs more; nothing else.
        let userfaults = userfaults.collect::<io::Result<_>>().unwrap_or_default();
        InheritedMemory { image: holding.image, userfaults, restore }
    };
    let memory = match listed.memory {
        Whereabouts::Present => None,
        Whereabouts::Away(holding) => Some(take(holding, None)),
        Whereabouts::Returning(number, holding) => Some(take(holding, Some(number))),
    };
    let Listed { sandbox, label, busy, .. } = listed;
    Inherited { sandbox, label, busy, memory }
}

fn done(reply: Reply) -> Result<(), KeeperError> {
    match reply {
        Reply::Done => Ok(()),
        Reply::Refused(why) => Err(KeeperError::Refused(why)),
        _ => Err(KeeperError::Protocol),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
