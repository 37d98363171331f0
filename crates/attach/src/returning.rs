//! One group's memory on its way back: its faults are answered, and the rest is filled in.

use std::sync::Arc;

use medes_agent::RestoreError;
use medes_agent::restore::{AddressSpace, Filling, RestoreBuffers, Served, Unasked};

/// Pages filled in before faults get their turn: what a thread may have to wait for.
const FILL_PAGES: u64 = 16;

/// What is put back with each page that a thread waits for.
const UNASKED: Unasked = Unasked::Block(8);

/// How it went.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Returned {
    /// Page faults answered.
    pub(crate) faults: u64,
    /// Pages that were put back for them.
    pub(crate) pages: u64,
}

/// Brings all memory back while the group runs. Returns when nothing is missing and every
/// userfaultfd has been released, or the last process has ended. With `keep` those that tell of
/// writes are not released: they are left in `spaces`, and have to be served on.
///
/// # Errors
/// [`RestoreError`]: a group that lacks pages must be killed, for a thread may wait for ever. Until
/// it has been, `spaces` may not be dropped: it would read zeros.
pub(crate) fn bring_back(
    spaces: &mut Vec<Arc<AddressSpace>>,
    keep: bool,
) -> Result<Returned, RestoreError> {
    let mut buffers = RestoreBuffers::default();
    let mut returned = Returned::default();
    let is_due = |space: &Arc<AddressSpace>| !keep || space.filling() == Filling::Going;
    while spaces.iter().any(is_due) {
        let mut children = Vec::new();
        let left = advance(spaces, keep, &mut buffers, &mut returned, &mut children);
        let mut is_left = left.iter().flatten().copied();
        spaces.retain(|_| is_left.next().unwrap_or(true));
        spaces.extend(children);
        left?;
    }
    Ok(returned)
}

/// Brings some memory back to each process. Returns which of them are to be served on.
fn advance(
    spaces: &[Arc<AddressSpace>],
    keep: bool,
    buffers: &mut RestoreBuffers,
    returned: &mut Returned,
    children: &mut Vec<Arc<AddressSpace>>,
) -> Result<Vec<bool>, RestoreError> {
    let mut left = Vec::with_capacity(spaces.len());
    for next in spaces {
        // A thread of any of them may be waiting.
        for space in spaces {
            let mut served = Served::default();
            let result = space.serve(UNASKED, buffers, &mut served);
            note(returned, children, served);
            match result {
                Ok(()) => {}
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error),
            }
        }
        let mut served = Served::default();
        let result = next.fill(FILL_PAGES, keep, buffers, &mut served);
        note(returned, children, served);
        left.push(match result {
            Ok(Filling::Released) => false,
            Ok(Filling::Going | Filling::Done) => true,
            Err(error) if error.is_gone() => false,
            Err(error) => return Err(error),
        });
    }
    Ok(left)
}

fn note(returned: &mut Returned, children: &mut Vec<Arc<AddressSpace>>, served: Served) {
    returned.faults += served.faults;
    returned.pages += served.pages;
    children.extend(served.children);
}
