//! One instance at a time, and nothing left of the one before that it did not take over.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use medes_sandbox::CgroupRoot;

use crate::error::NodeError;

/// The right to use a run directory, for as long as this value lives.
#[derive(Debug)]
pub(crate) struct InstanceLock {
    path: PathBuf,
    _file: File,
}

impl InstanceLock {
    /// Takes the lock of a run directory, making the directory if need be.
    pub(crate) fn take(run_dir: &Path) -> Result<Self, NodeError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| NodeError::File { path, error }
        };
        std::fs::create_dir_all(run_dir).map_err(failed(run_dir))?;
        let path = run_dir.join("lock");
        loop {
            let mut options = OpenOptions::new();
            let file = options.create(true).write(true).truncate(false).open(&path);
            let file = file.map_err(failed(&path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(NodeError::Running(run_dir.to_owned()));
                }
                Err(TryLockError::Error(error)) => return Err(NodeError::File { path, error }),
            }
            // An instance that ended since the file was opened has removed it: what is locked now
            // is a file that nobody else will find.
            let is_there = std::fs::metadata(&path).is_ok_and(|there| {
                file.metadata()
                    .is_ok_and(|own| (own.dev(), own.ino()) == (there.dev(), there.ino()))
            });
            if is_there {
                return Ok(Self { path, _file: file });
            }
        }
    }

    /// Removes the file, as the last thing that the instance does with the directory.
    pub(crate) fn remove(&self) -> Result<(), NodeError> {
        std::fs::remove_file(&self.path)
            .map_err(|error| NodeError::File { path: self.path.clone(), error })
    }
}

/// Where the keeper's process number is kept, to find one that an earlier daemon left behind.
pub(crate) fn keeper_pid_file(run_dir: &Path) -> PathBuf {
    run_dir.join("keeper.pid")
}

/// Where the keeper listens.
pub(crate) fn keeper_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("keeper.sock")
}

/// Where the keeper writes what nobody asked it for.
pub(crate) fn keeper_log(run_dir: &Path) -> PathBuf {
    run_dir.join("keeper.log")
}

/// The keeper of this run directory, if it lives.
pub(crate) fn running_keeper(run_dir: &Path) -> Option<i32> {
    let text = std::fs::read_to_string(keeper_pid_file(run_dir)).ok()?;
    let pid = text.trim().parse().ok()?;
    is_keeper(pid, &keeper_socket(run_dir)).then_some(pid)
}

/// Whether this process is the keeper of this socket; its number may be somebody else's by now.
fn is_keeper(pid: i32, socket: &Path) -> bool {
    // Empty as soon as the process is dead, even if nobody has buried it yet.
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    command.split(|b| *b == 0).any(|argument| argument == socket.as_os_str().as_bytes())
}

/// Ends whatever an earlier daemon left behind: its keeper, its sandboxes, their cgroups. Returns
/// how many sandboxes there were.
pub(crate) fn clean_up(run_dir: &Path, root: &CgroupRoot) -> Result<usize, NodeError> {
    if let Some(pid) = running_keeper(run_dir) {
        kill_keeper(pid, &keeper_socket(run_dir));
    }
    let _ = std::fs::remove_file(keeper_pid_file(run_dir));
    let left = root.list()?.len();
    root.remove_all(Duration::from_secs(10))?;
    let _ = std::fs::remove_file(keeper_socket(run_dir));
    Ok(left)
}

fn kill_keeper(pid: i32, socket: &Path) {
    use nix::sys::signal::{Signal, kill};
    for _ in 0..500 {
        if !is_keeper(pid, socket) {
            return;
        }
        // Not asked: its sandboxes are killed below in any case, whatever state it is in.
        let _ = kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
        std::thread::sleep(Duration::from_millis(10));
    }
}
