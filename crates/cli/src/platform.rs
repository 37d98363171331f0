//! A private platform: a `medes serve` with its own directory, port, cgroup and user ids.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::client::Client;
use crate::config::Config;

/// How long the platform may take to answer its first health check.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to end all sandboxes and itself.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// A running private platform. Dropping it ends the platform and removes its directory.
pub struct Platform {
    child: Child,
    cgroup: String,
    directory: Option<TempDir>,
    log: PathBuf,
    client: Client,
    signals: Arc<Signals>,
    status: Option<ExitStatus>,
}

/// What a private platform is to be like.
pub struct Settings<'a> {
    /// Where its directory is made; the system's temporary directory if not said.
    pub parent: Option<&'a Path>,
    /// The directory with the installed runtimes.
    pub runtimes: &'a Path,
    /// What tells it from others in names of directories and cgroups, such as `demo`.
    pub name: &'a str,
    /// Changes to the default configuration.
    pub change: &'a dyn Fn(&mut Config),
    /// Whether the directory stays after the end.
    pub keep: bool,
}

impl Platform {
    /// Starts a platform and waits until it answers.
    ///
    /// # Errors
    /// If it ends or stays silent; the error holds the end of its log.
    pub fn start(settings: &Settings<'_>) -> Result<Self> {
        let mut builder = tempfile::Builder::new();
        let prefix = format!("medes-{}-", settings.name);
        builder.prefix(&prefix).disable_cleanup(settings.keep);
        let signals = Signals::watch()?;
        let directory = match settings.parent {
            Some(parent) => builder.tempdir_in(parent),
            None => builder.tempdir(),
        }
        .context("making a directory for the platform")?;
        let data_dir = directory.path().join("data");
        std::fs::create_dir(&data_dir)?;
        std::os::unix::fs::symlink(settings.runtimes, data_dir.join("runtimes"))?;

        let listen = free_port()?;
        let number = std::process::id();
        let mut config = Config::default();
        config.api.listen = listen;
        config.node.data_dir = data_dir;
        config.node.run_dir = directory.path().join("run");
        let cgroup = format!("medes-{}-{number}", settings.name);
        config.node.cgroup.clone_from(&cgroup);
        // Ids of its own, in a range that no distribution gives to people or containers.
        config.node.uid_base = 1_000_000_000 + number % 16_384 * 65_536;
        (settings.change)(&mut config);
        let config_file = directory.path().join("medes.toml");
        std::fs::write(&config_file, config.render())?;

        let log = directory.path().join("serve.log");
        let out = File::create(&log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve").arg("--config").arg(&config_file);
        command.stdin(std::process::Stdio::null()).stdout(out.try_clone()?).stderr(out);
        // Its own process group: Ctrl-C is for this process, which then ends the platform in order.
        command.process_group(0);
        let child = command.spawn().context("starting `medes serve`")?;
        signals.platform.store(pid(&child).as_raw(), Ordering::SeqCst);
        let client = Client::new(&format!("http://{listen}"))?;
        let mut platform =
            Self { child, cgroup, directory: Some(directory), log, client, signals, status: None };
        platform.wait_until_healthy()?;
        Ok(platform)
    }

    /// A client for this platform.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The processes that make it up: the daemon and the keeper.
    ///
    /// # Errors
    /// If the keeper's number is not known.
    pub fn processes(&self) -> Result<[Pid; 2]> {
        let path = self.directory().join("run/keeper.pid");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let keeper = text.trim().parse().with_context(|| path.display().to_string())?;
        Ok([pid(&self.child), Pid::from_raw(keeper)])
    }

    /// The name of its cgroups.
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        self.log.parent().unwrap_or(Path::new("/"))
    }

    /// Whether the user asked to stop.
    pub fn interrupted(&self) -> bool {
        self.signals.interrupted.load(Ordering::SeqCst)
    }

    /// The last lines of the platform's log.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&log);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Whether the platform's process has ended.
    pub fn has_ended(&mut self) -> bool {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status.is_some()
    }

    /// Ends the platform in order and removes its directory.
    ///
    /// # Errors
    /// If it has to be killed, or ends with an error.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn wait_until_healthy(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            if self.client.get::<Value>("/v1/health").is_ok() {
                return Ok(());
            }
            if self.has_ended() {
                let status = self.status.map_or_else(String::new, |s| s.to_string());
                bail!("`medes serve` ended ({status}):\n{}", self.log_tail());
            }
            if start.elapsed() > START_LIMIT || self.interrupted() {
                bail!("`medes serve` gave no sign of life:\n{}", self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn end(&mut self) -> Result<()> {
        let result = self.end_child();
        if let Some(directory) = self.directory.take() {
            directory.close().context("removing the platform's directory")?;
        }
        result
    }

    fn end_child(&mut self) -> Result<()> {
        if !self.has_ended() {
            kill(pid(&self.child), Signal::SIGTERM).context("stopping `medes serve`")?;
        }
        let start = Instant::now();
        while !self.has_ended() {
            if start.elapsed() > STOP_LIMIT {
                let tail = self.log_tail();
                let _ = self.child.kill();
                self.status = self.child.wait().ok();
                bail!("`medes serve` did not stop within {STOP_LIMIT:?} and was killed:\n{tail}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        match self.status {
            Some(status) if !status.success() => {
                bail!("`medes serve` ended with {status}:\n{}", self.log_tail())
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Platform {
    fn drop(&mut self) {
        if self.directory.is_none() {
            return;
        }
        // That it ended by itself is what brought us here, and has been said.
        let known = self.has_ended();
        if let Err(e) = self.end()
            && !known
        {
            eprintln!("medes: {e:#}");
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?)
}

/// What a signal has to do with.
#[derive(Default)]
struct Signals {
    interrupted: AtomicBool,
    /// The platform's process, 0 as long as there is none.
    platform: AtomicI32,
}

impl Signals {
    /// On SIGINT, SIGTERM or SIGHUP: notes it and tells the platform to end, which also ends
    /// whatever call is being waited for. The measurement then finds the note and cleans up.
    fn watch() -> Result<Arc<Self>> {
        use tokio::signal::unix::{SignalKind, signal};

        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let mut streams = {
            let _context = runtime.enter();
            [
                signal(SignalKind::interrupt())?,
                signal(SignalKind::terminate())?,
                signal(SignalKind::hangup())?,
            ]
        };
        let signals = Arc::new(Self::default());
        let noted = signals.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                let [int, term, hup] = &mut streams;
                tokio::select! { _ = int.recv() => {}, _ = term.recv() => {}, _ = hup.recv() => {} }
                noted.interrupted.store(true, Ordering::SeqCst);
                let platform = noted.platform.load(Ordering::SeqCst);
                if platform != 0 {
                    // Fails only if the platform has gone already.
                    let _ = kill(Pid::from_raw(platform), Signal::SIGTERM);
                }
            });
        })?;
        Ok(signals)
    }
}
