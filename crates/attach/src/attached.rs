//! One attached group, through dedup and back.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use medes_agent::dedup::{Handover, Holder};
use medes_agent::restore::{AddressSpace, HeldImage, RestoreBuffers};
use medes_agent::view::SpaceView;
use medes_agent::working_set::Prefetch;
use medes_core::{DomainId, FunctionId};
use medes_memory::guard::{Order, Orders};
use medes_memory::session::Freezer;
use medes_memory::userfault::UserFault;
use medes_store::{ImageHandle, View};
use parking_lot::Mutex;

use crate::cells::Cells;
use crate::protocol::{Attached, State};
use crate::returning::{Returned, bring_back};
use crate::target::Target;
use crate::watched::Watched;

/// A group of processes that is attached.
pub(crate) struct Group {
    pub(crate) id: String,
    pub(crate) target: Target,
    pub(crate) program: String,
    pub(crate) domain: String,
    pub(crate) domain_id: DomainId,
    /// Stands for the program: groups that run the same one are likely to share pages.
    pub(crate) function: FunctionId,
    pub(crate) cells: Cells,
    pub(crate) since_ms: u64,
    pub(crate) memory: Mutex<Memory>,
}

/// Where a group's memory is.
pub(crate) enum Memory {
    /// Where it belongs, but not for long.
    Going,
    /// Away.
    Away(Away),
    /// On its way back: private bytes and image bytes as they were.
    Returning(u64, u64),
}

/// What brings a group's memory back.
pub(crate) struct Away {
    pub(crate) left: Left,
    pub(crate) held: Held,
    pub(crate) private_bytes: u64,
    pub(crate) image_bytes: u64,
}

/// What a dedup operation leaves.
pub(crate) struct Left {
    pub(crate) image: ImageHandle,
    /// One for each process of the image.
    pub(crate) userfaults: Vec<UserFault>,
    /// These processes, in order.
    pub(crate) pids: Vec<i32>,
}

/// An image with its userfaultfds, and the order to kill the group should this process die.
pub(crate) struct Held {
    pub(crate) image: HeldImage,
    pub(crate) orders: Vec<Order>,
}

impl Group {
    /// As others see it.
    pub(crate) fn describe(&self) -> Attached {
        let (state, private_bytes, image_bytes) = match &*self.memory.lock() {
            Memory::Going => (State::Deduping, 0, 0),
            Memory::Away(away) => (State::Dedup, away.private_bytes, away.image_bytes),
            Memory::Returning(private, image) => (State::Restoring, *private, *image),
        };
        Attached {
            id: self.id.clone(),
            target: self.target.clone(),
            state,
            program: self.program.clone(),
            domain: self.domain.clone(),
            pids: self.cells.pids(),
            private_bytes,
            image_bytes,
            since_ms: self.since_ms,
        }
    }
}

impl Held {
    /// Lets the group run, and brings its memory back. `runs` is called once it runs. With `keep`
    /// the address spaces in the answer have to be served on.
    ///
    /// # Errors
    /// Why that is not possible; the group has been killed.
    pub(crate) fn bring_back(
        self,
        mut cells: &Cells,
        keep: bool,
        runs: impl FnOnce(),
    ) -> Result<(Returned, Vec<Arc<AddressSpace>>), String> {
        let revived = self.image.revive(&Prefetch::default(), &mut RestoreBuffers::default());
        let mut spaces = revived.map(|revived| revived.spaces).map_err(|error| {
            cells.kill();
            error.to_string()
        })?;
        let returned = match cells.thaw() {
            Ok(()) => {
                runs();
                bring_back(&mut spaces, keep).map_err(|error| error.to_string())
            }
            Err(error) => Err(format!("thawing: {error}")),
        };
        if returned.is_err() {
            // Before any userfaultfd of it is closed.
            cells.kill();
        }
        // Nothing is missing any more.
        drop(self.orders);
        Ok((returned?, spaces))
    }
}

/// Takes hold of a group's image while the operation runs, within this process.
pub(crate) struct Holding<'a> {
    pub(crate) view: &'a Arc<View>,
    pub(crate) cells: &'a Cells,
    pub(crate) orders: &'a Orders,
    /// What the restore before has left to follow.
    pub(crate) watched: Option<&'a Watched>,
    pub(crate) held: Mutex<Option<Held>>,
}

impl Holder for Holding<'_> {
    fn hold(&self, handover: &Handover<'_>) -> Result<(), String> {
        let Handover { image, userfaults, residents, .. } = handover;
        let duplicates: std::io::Result<Vec<OwnedFd>> =
            userfaults.iter().map(|fd| fd.as_fd().try_clone_to_owned()).collect();
        let duplicates = duplicates.map_err(|error| error.to_string())?;
        let orders = self.cells.guarded(self.orders).map_err(|error| error.to_string())?;
        let image = HeldImage::open(Arc::clone(self.view), image.extent(), duplicates);
        let mut image = image.map_err(|error| error.to_string())?;
        image.leave(residents.to_vec());
        *self.held.lock() = Some(Held { image, orders });
        Ok(())
    }

    fn release(&self) {
        self.held.lock().take();
    }

    fn left(&self, ranges: &[Vec<Range<u64>>]) -> Result<(), String> {
        let mut held = self.held.lock();
        held.as_mut().ok_or("nothing is held")?.image.leave(ranges.to_vec());
        Ok(())
    }

    fn take_back(&self, _: &[Vec<Range<u64>>], _: &mut dyn FnMut()) -> Result<(), String> {
        Err("nobody takes a group back from an operation".into())
    }

    fn put_back(&self) -> Result<(), String> {
        let held = self.held.lock().take().ok_or("nothing is held")?;
        held.bring_back(self.cells, false, || {})?;
        self.watched.into_iter().for_each(Watched::forget);
        Ok(())
    }

    fn suspend(&self) -> Result<Vec<SpaceView>, String> {
        self.watched.ok_or("the group's memory is not watched")?.suspend()
    }

    fn resume(&self) -> Result<(), String> {
        self.watched.ok_or("the group's memory is not watched")?.resume();
        Ok(())
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
