//! One group's memory on its way back: its faults are answered, and the rest is filled in.

use std::sync::Arc;

use medes_agent::RestoreError;
use medes_agent::restore::{AddressSpace, Filling, RestoreBuffers, Revived, Served};

/// Pages filled in before faults get their turn: what a thread may have to wait for.
const FILL_PAGES: u64 = 16;

/// Pages put back with one that a thread waits for.
const NEIGHBOURS: u64 = 8;

/// How it went.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Returned {
    /// Page faults answered.
    pub(crate) faults: u64,
    /// Pages that were put back for them.
    pub(crate) pages: u64,
}

/// Brings all memory back while the group runs. Returns when nothing is missing and every
/// userfaultfd has been released, or the last process has ended.
///
/// # Errors
/// [`RestoreError`]: the group must be killed, for a thread may wait for ever.
pub(crate) fn bring_back(revived: Revived) -> Result<Returned, RestoreError> {
    let mut buffers = RestoreBuffers::default();
    let mut spaces = revived.spaces;
    let mut returned = Returned::default();
    while !spaces.is_empty() {
        let mut children = Vec::new();
        let mut left = Vec::with_capacity(spaces.len());
        for n in 0..spaces.len() {
            // A thread of any of them may be waiting.
            for space in &spaces {
                let mut served = Served::default();
                match space.serve(NEIGHBOURS, &mut buffers, &mut served) {
                    Ok(()) => {}
                    Err(error) if error.is_gone() => {}
                    Err(error) => return Err(error),
                }
                note(&mut returned, &mut children, served);
            }
            let space = &spaces[n];
            let mut served = Served::default();
            match space.fill(FILL_PAGES, false, &mut buffers, &mut served) {
                Ok(Filling::Released) => {}
                Ok(Filling::Going | Filling::Done) => left.push(Arc::clone(space)),
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error),
            }
            note(&mut returned, &mut children, served);
        }
        left.extend(children);
        spaces = left;
    }
    Ok(returned)
}

fn note(returned: &mut Returned, children: &mut Vec<Arc<AddressSpace>>, served: Served) {
    returned.faults += served.faults;
    returned.pages += served.pages;
    children.extend(served.children);
}
