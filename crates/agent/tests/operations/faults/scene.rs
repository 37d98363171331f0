//! A sandbox that is operated on, and who holds its memory meanwhile: what the keeper does, in
//! this process.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use medes_agent::RestoreError;
use medes_agent::dedup::{Handover, Holder};
use medes_agent::restore::{
    self, AddressSpace, Filling, HeldImage, RestoreBuffers, Served, Unasked,
};
use medes_agent::view::SpaceView;
use medes_agent::working_set::Prefetch;
use medes_sandbox::Cgroup;
use medes_store::View;
use nix::poll::{PollFd, PollFlags, poll};

use crate::harness::{Target, pages_of};

/// Where programs' memory begins that is neither their own data nor their heap.
const UPPER: u64 = 0x7000_0000_0000;

/// Where a sandbox's memory is, as the keeper knows it.
#[derive(Default)]
pub enum Memory {
    /// Where it belongs.
    #[default]
    Present,
    /// Away; and what there was before, from an earlier image.
    Held(HeldImage, Vec<Arc<AddressSpace>>),
    /// On its way back, or back and watched.
    Returning(Vec<Arc<AddressSpace>>),
    /// Given away.
    Suspended(Vec<Arc<AddressSpace>>),
}

/// Takes hold of one sandbox's memory.
pub struct Keeping {
    pub view: Arc<View>,
    pub cgroup: Cgroup,
    pub memory: Mutex<Memory>,
}

impl Keeping {
    pub fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes charge of an image.
    pub fn take(&self, held: HeldImage) -> Result<(), String> {
        let mut memory = self.memory();
        let before = match std::mem::take(&mut *memory) {
            Memory::Present => Vec::new(),
            Memory::Suspended(before) => before,
            other => {
                *memory = other;
                return Err("the sandbox's memory is not all its own".into());
            }
        };
        *memory = Memory::Held(held, before);
        Ok(())
    }

    /// Brings the memory back and lets the sandbox run: with part of it, until `stop` says so.
    /// `runs` is called once it runs. With `keep` it is watched further.
    pub fn restore(
        &self,
        keep: bool,
        runs: impl FnOnce(),
        stop: &AtomicBool,
    ) -> Result<(), String> {
        let mut buffers = RestoreBuffers::default();
        let mut spaces = self.revive(&mut buffers)?;
        runs();
        serve(&spaces, stop, &mut buffers).map_err(|error| error.to_string())?;
        fill(&mut spaces, keep, &mut buffers).map_err(|error| error.to_string())?;
        if spaces.is_empty() {
            *self.memory() = Memory::Present;
        }
        Ok(())
    }

    /// Lets the sandbox run, unless a request has done so already.
    fn revive(&self, buffers: &mut RestoreBuffers) -> Result<Vec<Arc<AddressSpace>>, String> {
        let mut memory = self.memory();
        let image = match std::mem::take(&mut *memory) {
            Memory::Held(image, _) => image,
            other => {
                *memory = other;
                return match &*memory {
                    Memory::Returning(spaces) => Ok(spaces.clone()),
                    _ => Err("the sandbox is not in the dedup state".into()),
                };
            }
        };
        // Of the first process most beforehand, of the others nothing.
        let mut early = pages_of(Arc::clone(&self.view), &image);
        early.truncate(1);
        early[0].retain(|range| range.start >= UPPER);
        let early = Prefetch::of(&early);
        let revived = image.revive(&early, buffers).map_err(|error| error.to_string())?;
        *memory = Memory::Returning(revived.spaces.clone());
        drop(memory);
        self.cgroup.thaw().map_err(|error| error.to_string())?;
        Ok(revived.spaces)
    }
}

/// Answers faults until `stop` says so.
pub fn serve(
    spaces: &[Arc<AddressSpace>],
    stop: &AtomicBool,
    buffers: &mut RestoreBuffers,
) -> Result<(), RestoreError> {
    let mut watched = Vec::with_capacity(spaces.len());
    for space in spaces {
        let fd = space.with_descriptor(|fd| fd.try_clone_to_owned());
        watched.push((space, fd.map_err(RestoreError::Events)?));
    }
    while !stop.load(Ordering::Acquire) {
        // As the keeper waits, but in a call that is not among the steps.
        let mut ready: Vec<_> =
            watched.iter().map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        let _ = poll(&mut ready, 1u8);
        let is_ready: Vec<bool> = ready.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let mut gone = Vec::new();
        for (n, (space, _)) in watched.iter().enumerate().filter(|(n, _)| is_ready[*n]) {
            match space.serve(Unasked::Ahead, buffers, &mut Served::default()) {
                Ok(()) => {}
                Err(error) if error.is_gone() => gone.push(n),
                Err(error) => return Err(error),
            }
        }
        gone.iter().rev().for_each(|n| drop(watched.remove(*n)));
    }
    Ok(())
}

fn fill(
    spaces: &mut Vec<Arc<AddressSpace>>,
    keep: bool,
    buffers: &mut RestoreBuffers,
) -> Result<(), RestoreError> {
    let mut left = Vec::new();
    for space in spaces.drain(..) {
        loop {
            match space.fill(64, keep, buffers, &mut Served::default()) {
                Ok(Filling::Going) => {}
                Ok(Filling::Done) if !keep => {}
                Ok(Filling::Done) => {
                    left.push(space);
                    break;
                }
                Ok(Filling::Released) => break,
                Err(error) if error.is_gone() => break,
                Err(error) => return Err(error),
            }
        }
    }
    *spaces = left;
    Ok(())
}

impl Holder for Keeping {
    fn hold(&self, handover: &Handover<'_>) -> Result<(), String> {
        let Handover { image, userfaults, residents, .. } = handover;
        let userfaults: io::Result<Vec<OwnedFd>> =
            userfaults.iter().map(|fd| fd.try_clone_to_owned()).collect();
        let userfaults = userfaults.map_err(|error| error.to_string())?;
        let held = HeldImage::open(Arc::clone(&self.view), image.extent(), userfaults);
        let mut held = held.map_err(|error| error.to_string())?;
        held.leave(residents.to_vec());
        self.take(held)
    }

    fn release(&self) {
        let mut memory = self.memory();
        *memory = match std::mem::take(&mut *memory) {
            Memory::Held(_, before) if before.is_empty() => Memory::Present,
            Memory::Held(_, before) => Memory::Suspended(before),
            other => other,
        };
    }

    fn left(&self, ranges: &[Vec<Range<u64>>]) -> Result<(), String> {
        match &mut *self.memory() {
            Memory::Held(image, _) => {
                image.leave(ranges.to_vec());
                Ok(())
            }
            _ => Err("nothing is held".into()),
        }
    }

    fn take_back(
        &self,
        left: &[Vec<Range<u64>>],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), String> {
        meanwhile();
        self.left(left)?;
        let mut memory = self.memory();
        let Memory::Held(image, _) = std::mem::take(&mut *memory) else {
            return Err("nothing is held".into());
        };
        let revived = image.revive(&Prefetch::default(), &mut RestoreBuffers::default());
        *memory = Memory::Returning(revived.map_err(|error| error.to_string())?.spaces);
        Ok(())
    }

    fn put_back(&self) -> Result<(), String> {
        self.restore(false, || {}, &AtomicBool::new(true))
    }

    fn suspend(&self) -> Result<Vec<SpaceView>, String> {
        let mut memory = self.memory();
        let mut spaces = match &*memory {
            Memory::Returning(spaces) => spaces.clone(),
            _ => return Err("the sandbox's memory is not watched".into()),
        };
        let views = restore::suspend(&mut spaces, &mut RestoreBuffers::default(), |_, _| {})?;
        *memory = Memory::Suspended(spaces);
        Ok(views)
    }

    fn resume(&self) -> Result<(), String> {
        let mut memory = self.memory();
        let spaces = match std::mem::take(&mut *memory) {
            Memory::Suspended(spaces) => spaces,
            other => {
                *memory = other;
                return Err("the sandbox is not suspended".into());
            }
        };
        spaces.iter().for_each(|space| space.resume());
        *memory = Memory::Returning(spaces);
        Ok(())
    }
}

/// What a sandbox says when it is asked about its memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    Right,
    Dead,
}

/// The exit status of a subject whose second process was killed.
const CHILD_KILLED: i32 = 4;

/// Asks a sandbox, which has been asked `asked` times. Wrong memory is the end.
pub fn ask(target: &mut Target, asked: &mut u32) -> Answer {
    target.tell("");
    *asked += 1;
    match target.line().as_str() {
        "" => {
            let end = target.wait();
            let is_killed = end.signal() == Some(libc::SIGKILL) || end.code() == Some(CHILD_KILLED);
            assert!(is_killed, "it did not die by being killed: {end}");
            Answer::Dead
        }
        line if line == format!("right {asked}") => Answer::Right,
        wrong => panic!("{wrong}"),
    }
}

/// Starts the subject of this suite, compiled once.
pub fn start(seed: u64) -> Target {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/operations/faults/subject.c");
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        // Each test may be a process of its own, all of them at once.
        let own = directory.join(format!("faults-{}", std::process::id()));
        let mut cc = Command::new("cc");
        cc.args(["-O1", "-pthread", "-o"]).arg(&own).arg(source);
        let compiled = cc.status().expect("a C compiler (Debian package gcc)");
        assert!(compiled.success(), "the subject does not compile");
        let program = directory.join("faults");
        std::fs::rename(&own, &program).expect("renames");
        program
    });
    let mut command = Command::new(program);
    command.arg(seed.to_string());
    Target::run(&command)
}
