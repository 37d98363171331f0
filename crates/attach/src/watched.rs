//! A group that was restored and still tells what it writes to: its next dedup costs that.
//!
//! All its memory is back. It runs on if this process should be killed, and it can be let go of at
//! any time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use medes_agent::RestoreError;
use medes_agent::restore::{self, AddressSpace, RestoreBuffers, Served, Unasked};
use medes_agent::view::SpaceView;
use medes_core::{DomainId, FunctionId};
use medes_store::ImageHandle;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;

use crate::attached::{Group, Left};
use crate::returning::bring_back;

/// How long a group is watched: its image takes memory, and memory that it touches for the first
/// time costs it a round trip to this process.
const WATCHED: Duration = Duration::from_secs(600);

/// A restored group, and what is left of its dedup.
pub(crate) struct Watched {
    pub(crate) domain_id: DomainId,
    pub(crate) function: FunctionId,
    pub(crate) left: Left,
    since: Instant,
    state: Mutex<State>,
}

struct State {
    /// One for each process of the image.
    spaces: Vec<Arc<AddressSpace>>,
    /// Who serves them; nobody while a dedup operation has them.
    serving: Option<Serving>,
    suspended: bool,
}

/// The thread that reads what the processes report.
struct Serving {
    /// It ends when this is closed.
    stop: UnixStream,
    thread: JoinHandle<()>,
}

impl Watched {
    /// Watches a group whose memory is back; `spaces` are those that still tell of it.
    pub(crate) fn new(group: &Group, spaces: Vec<Arc<AddressSpace>>, left: Left) -> Self {
        let mut state = State { spaces, serving: None, suspended: false };
        state.serve();
        let Group { domain_id, function, .. } = *group;
        Self { domain_id, function, left, since: Instant::now(), state: state.into() }
    }

    /// Stops serving, and says what of the image is where. The group must be frozen.
    ///
    /// # Errors
    /// Why that can't be said; it is served on then.
    pub(crate) fn suspend(&self) -> Result<Vec<SpaceView>, String> {
        let mut state = self.state.lock();
        state.stop();
        // What a process forks that has all its memory has all of its own.
        let views = restore::suspend(&mut state.spaces, &mut RestoreBuffers::default(), |_, _| {});
        state.suspended = views.is_ok();
        if views.is_err() {
            state.serve();
        }
        views
    }

    /// Serves on.
    pub(crate) fn resume(&self) {
        let mut state = self.state.lock();
        state.suspended = false;
        state.spaces.iter().for_each(|space| space.resume());
        state.serve();
    }

    /// Nothing of it is watched any more: it was dropped, and has come back otherwise.
    pub(crate) fn forget(&self) {
        self.state.lock().spaces.clear();
    }

    /// Whether there is nothing to be had from it any more.
    pub(crate) fn is_over(&self) -> bool {
        let state = self.state.lock();
        // One that can't be served has to be let go of.
        let is_served = state.serving.as_ref().is_some_and(|s| !s.thread.is_finished());
        let is_whole = state.spaces.len() == self.left.pids.len();
        !is_served
            || !is_whole
            || self.since.elapsed() > WATCHED
            || state.spaces.iter().any(|space| space.has_ended())
    }

    /// Lets go of the processes, unless a dedup operation has them, and gives back what is left.
    pub(crate) fn let_go(self) -> ImageHandle {
        let mut state = self.state.into_inner();
        state.stop();
        // If it fails, closing the userfaultfds does the rest: they lack nothing.
        if !state.suspended
            && let Err(error) = bring_back(&mut state.spaces, false)
        {
            tracing::debug!(%error, "letting go of processes");
        }
        self.left.image
    }
}

impl State {
    fn serve(&mut self) {
        match Serving::start(self.spaces.clone()) {
            Ok(serving) => self.serving = Some(serving),
            Err(error) => tracing::warn!(%error, "a restored group is not watched"),
        }
    }

    fn stop(&mut self) {
        if let Some(Serving { stop, thread }) = self.serving.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

impl Serving {
    fn start(spaces: Vec<Arc<AddressSpace>>) -> io::Result<Self> {
        let (stop, stopped) = UnixStream::pair()?;
        let thread = std::thread::Builder::new().name("watch".into()).spawn(move || {
            if let Err(error) = serve(&spaces, &stopped) {
                tracing::warn!(%error, "a restored group can't be watched any longer");
            }
        })?;
        Ok(Self { stop, thread })
    }
}

/// Follows what processes do to their memory until the other end of `stop` is closed.
fn serve(spaces: &[Arc<AddressSpace>], stop: &UnixStream) -> Result<(), RestoreError> {
    let mut buffers = RestoreBuffers::default();
    let own = |space: &Arc<AddressSpace>| {
        let fd: io::Result<OwnedFd> = space.with_descriptor(|fd| fd.try_clone_to_owned());
        Ok((Arc::clone(space), fd.map_err(RestoreError::Events)?))
    };
    let mut served = spaces.iter().map(own).collect::<Result<Vec<_>, RestoreError>>()?;
    loop {
        let descriptors = std::iter::once(stop.as_fd()).chain(served.iter().map(|s| s.1.as_fd()));
        let mut ready: Vec<_> = descriptors.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(RestoreError::Events(error.into())),
        }
        let mut is_ready = ready.iter().map(|fd| fd.any().unwrap_or(true)).collect::<Vec<_>>();
        if is_ready.remove(0) {
            return Ok(());
        }
        let mut is_ready = is_ready.into_iter();
        let mut failed = None;
        served.retain(|(space, _)| {
            if is_ready.next() != Some(true) {
                return true;
            }
            match space.serve(Unasked::Nothing, &mut buffers, &mut Served::default()) {
                Ok(()) => true,
                Err(error) if error.is_gone() => false,
                Err(error) => {
                    failed = Some(error);
                    true
                }
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
    }
}
