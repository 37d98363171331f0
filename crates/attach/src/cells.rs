//! The cgroups in which attached processes are frozen.
//!
//! A cgroup or container that is attached as a whole is frozen as it is. A process tree may share
//! its cgroup with others, which must go on: it is moved into a new cgroup right below its own, and
//! back when its memory is. The new one has no controllers, so every limit and every charge stays
//! where it was. Where controllers are in version 1, only the version 2 hierarchy, which has none
//! there, is touched.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use medes_memory::guard::{Order, Orders};
use medes_memory::session::Freezer;
use serde::{Deserialize, Serialize};

use crate::processes;
use crate::target::{Selection, directory};

/// How long processes may take to freeze: those in an uninterruptible system call take longer
/// than the usual fraction of a millisecond.
const FREEZE_LIMIT: Duration = Duration::from_secs(2);

/// How often processes that were born meanwhile are looked for.
const ROUNDS: usize = 16;

/// One cgroup that is frozen.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// Its directory in the version 2 hierarchy.
    path: PathBuf,
    /// Where its processes came from, if it was made for them.
    origin: Option<PathBuf>,
}

/// The cgroups of one attached group.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Cells(Vec<Cell>);

impl Cells {
    /// The cells for what was selected; processes are moved if need be. `name` names new cgroups.
    ///
    /// # Errors
    /// What the kernel says; processes are back where they were then.
    pub(crate) fn take(selection: &Selection, name: &str) -> io::Result<Self> {
        if let Selection::Unified(path) = selection {
            return Ok(Self(vec![Cell { path: path.clone(), origin: None }]));
        }
        let mut cells = Self::default();
        match cells.gather(selection, name) {
            Ok(()) => Ok(cells),
            Err(error) => {
                cells.give_back();
                Err(error)
            }
        }
    }

    /// Moves what was selected into cells until nothing is left outside.
    fn gather(&mut self, selection: &Selection, name: &str) -> io::Result<()> {
        let unified = processes::cgroup_mounts().0;
        let unified = unified.ok_or_else(|| io::Error::other("no cgroup version 2 hierarchy"))?;
        for _ in 0..ROUNDS {
            let mut outside: BTreeMap<PathBuf, Vec<i32>> = BTreeMap::new();
            for pid in selection.processes() {
                let cgroups = processes::cgroups(pid);
                let own = cgroups.iter().find(|(controllers, _)| controllers.is_empty());
                // It has ended if it has none.
                let Some((_, path)) = own else { continue };
                let path = directory(&unified, path).ok_or_else(|| {
                    io::Error::other(format!(
                        "process {pid} is in a cgroup that can't be seen from here"
                    ))
                })?;
                if !self.0.iter().any(|cell| cell.path == path) {
                    outside.entry(path).or_default().push(pid);
                }
            }
            if outside.is_empty() {
                return Ok(());
            }
            for (origin, pids) in outside {
                let cell = self.cell_below(&origin, name)?;
                for pid in pids {
                    match fs::write(cell.join("cgroup.procs"), pid.to_string()) {
                        // Ended meanwhile.
                        Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => {}
                        other => other.map_err(|e| {
                            let text = format!("moving process {pid} to {}: {e}", cell.display());
                            io::Error::new(e.kind(), text)
                        })?,
                    }
                }
            }
        }
        Err(io::Error::other("processes are born faster than they can be gathered"))
    }

    fn cell_below(&mut self, origin: &Path, name: &str) -> io::Result<PathBuf> {
        let path = origin.join(name);
        if !self.0.iter().any(|cell| cell.path == path) {
            fs::create_dir(&path).map_err(|e| {
                io::Error::new(e.kind(), format!("making the cgroup {}: {e}", path.display()))
            })?;
            self.0.push(Cell { path: path.clone(), origin: Some(origin.to_path_buf()) });
        }
        Ok(path)
    }

    /// Puts processes back where they came from and removes what was made. What still runs is
    /// thawed.
    pub(crate) fn give_back(&self) {
        for Cell { path, origin } in &self.0 {
            if let Err(error) = fs::write(path.join("cgroup.freeze"), "0") {
                tracing::debug!(%error, cgroup = %path.display(), "thawing");
            }
            let Some(origin) = origin else { continue };
            for _ in 0..ROUNDS {
                let pids = processes::in_cgroup(path);
                for pid in &pids {
                    if let Err(error) = fs::write(origin.join("cgroup.procs"), pid.to_string()) {
                        tracing::debug!(%error, pid, "moving a process back");
                    }
                }
                // It is busy until the last dead process is off the kernel's books.
                match fs::remove_dir(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    _ => break,
                }
            }
            if path.exists() {
                tracing::warn!(cgroup = %path.display(), "a cgroup is left that could not be removed");
            }
        }
    }

    /// Kills everybody, frozen or not.
    pub(crate) fn kill(&self) {
        for cell in &self.0 {
            if let Err(error) = fs::write(cell.path.join("cgroup.kill"), "1") {
                tracing::warn!(%error, cgroup = %cell.path.display(), "killing");
            }
        }
    }

    /// Has everybody killed when this process dies.
    pub(crate) fn guarded(&self, orders: &Orders) -> io::Result<Vec<Order>> {
        let order = |cell: &Cell| {
            let file = fs::File::options().write(true).open(cell.path.join("cgroup.kill"))?;
            let order = orders.add(OwnedFd::from(file));
            order.ok_or_else(|| io::Error::other("too many groups are attached"))
        };
        self.0.iter().map(order).collect()
    }

    /// Whether somebody else has let any of it run: an engine that unpauses a container, say.
    pub(crate) fn is_thawed(&self) -> bool {
        let thawed = |cell: &Cell| read(&cell.path, "cgroup.freeze").is_ok_and(|s| s.trim() == "0");
        self.0.iter().any(thawed)
    }

    /// The processes in it.
    pub(crate) fn pids(&self) -> Vec<i32> {
        let mut all: Vec<i32> = self.0.iter().flat_map(|c| processes::in_cgroup(&c.path)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn freeze_all(&self, frozen: bool) -> io::Result<()> {
        for cell in &self.0 {
            fs::write(cell.path.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
        }
        if !frozen {
            return Ok(());
        }
        let until = Instant::now() + FREEZE_LIMIT;
        for cell in &self.0 {
            while !read(&cell.path, "cgroup.events")?.lines().any(|line| line == "frozen 1") {
                if Instant::now() > until {
                    self.freeze_all(false)?;
                    let why =
                        format!("{} did not freeze within {FREEZE_LIMIT:?}", cell.path.display());
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        Ok(())
    }
}

impl Freezer for &Cells {
    fn freeze(&mut self) -> io::Result<()> {
        self.freeze_all(true)
    }

    fn thaw(&mut self) -> io::Result<()> {
        self.freeze_all(false)
    }

    fn processes(&mut self) -> io::Result<Vec<i32>> {
        Ok(self.pids())
    }
}

fn read(directory: &Path, file: &str) -> io::Result<String> {
    fs::read_to_string(directory.join(file))
}
