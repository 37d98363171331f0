//! The sandboxes of one function, what is estimated on them, and what is done to them.

use anyhow::{Result, ensure};
use bytes::Bytes;
use medes_agent::dedup::Estimate;
use medes_core::{FunctionSpec, Layout, MemoryUse, SandboxId};
use medes_node::DedupReport;
use medes_pages::PAGE_SIZE;
use medes_registry::Scope;

use super::{BASE_REQUESTS, Bases, Estimated, REQUESTS, gone};
use crate::bank::Bank;
use crate::functions::Function;
use crate::testbed::{BASE, SHORT, Testbed};
use crate::{mean, share};

/// Numbers of the requests to one sandbox begin this far from those to the next.
const APART: u32 = 1000;
/// The request whose answer is compared.
const PROBE: u32 = 99 * APART;

/// The sandboxes of one function with one layout.
pub(super) struct Sandboxes<'f> {
    pub(super) function: &'f Function,
    pub(super) spec: FunctionSpec,
    /// The one whose memory becomes the base snapshot.
    pub(super) base: SandboxId,
    pub(super) others: Vec<SandboxId>,
    /// The base sandbox's answer to the request that is compared.
    answer: Bytes,
}

/// What was measured on the sandboxes of one function.
pub(super) struct Measured {
    /// What the base snapshot costs.
    pub(super) base_bytes: u64,
    /// What the operations did, one for each of the other sandboxes.
    pub(super) reports: Vec<DedupReport>,
    pub(super) answers_checked: u32,
}

impl<'f> Sandboxes<'f> {
    /// Starts the sandboxes and has them serve requests.
    pub(super) fn start(testbed: &Testbed, function: &'f Function, layout: Layout) -> Result<Self> {
        let spec = function.spec(layout);
        let serve = |instance: u32, requests: u32| -> Result<SandboxId> {
            let sandbox = testbed.start(&spec)?;
            for n in 0..requests {
                testbed.invoke(&spec, sandbox, &function.event(instance * APART + n))?;
            }
            Ok(sandbox)
        };
        let base = serve(0, BASE_REQUESTS - 1)?;
        let answer = testbed.invoke(&spec, base, &function.event(PROBE))?;
        let others = REQUESTS.into_iter().zip(1..).map(|(requests, n)| serve(n, requests));
        let others = others.collect::<Result<_>>()?;
        Ok(Self { function, spec, base, others, answer })
    }

    /// What remains outside of each sandbox when the bases are those of a bank.
    pub(super) fn estimate(
        &self,
        testbed: &Testbed,
        bank: &Bank,
        scope: Scope,
    ) -> Result<Estimated> {
        let mut all = Estimated::default();
        for sandbox in &self.others {
            let found =
                testbed.inspect(*sandbox, |pids| bank.estimate(pids, self.spec.id, scope))?;
            all.push(found);
        }
        Ok(all)
    }

    /// What would remain outside of the first sandbox.
    pub(super) fn estimate_first(
        &self,
        testbed: &Testbed,
        bank: &Bank,
        scope: Scope,
    ) -> Result<u64> {
        let found =
            testbed.inspect(self.others[0], |pids| bank.estimate(pids, self.spec.id, scope))?;
        Ok(image_bytes(found))
    }

    /// Makes the base snapshot, deduplicates and restores the other sandboxes, compares an
    /// answer, and ends all of them.
    pub(super) fn dedup(&self, testbed: &Testbed) -> Result<Measured> {
        let before = testbed.memory();
        testbed.dedup(self.base, BASE)?;
        let after = testbed.memory();
        let base_bytes = (after.base + after.registry) - (before.base + before.registry);
        let mut measured = Measured { base_bytes, reports: Vec::new(), answers_checked: 0 };
        for sandbox in &self.others {
            let mut report = testbed.dedup(*sandbox, SHORT)?;
            // Once more, for what the kernel gives back a little later.
            report.after = testbed.memory_of(*sandbox)?;
            measured.reports.push(report);
            testbed.restore(*sandbox)?;
            let answer = testbed.invoke(&self.spec, *sandbox, &self.function.event(PROBE))?;
            ensure!(
                answer == self.answer,
                "{} answers otherwise after a restore",
                self.function.name()
            );
            measured.answers_checked += 1;
            testbed.purge(*sandbox);
        }
        testbed.purge(self.base);
        Ok(measured)
    }
}

fn image_bytes(estimate: Estimate) -> u64 {
    estimate.image_bytes.next_multiple_of(PAGE_SIZE as u64)
}

impl Estimated {
    pub(super) fn push(&mut self, estimate: Estimate) {
        let counts = estimate.counts;
        let based = counts.equal + counts.patched;
        self.image_bytes.push(image_bytes(estimate));
        self.foreign_pages.push(share(counts.foreign as f64, based as f64));
    }
}

impl Measured {
    pub(super) fn mean_of(&self, get: impl Fn(&DedupReport) -> u64) -> u64 {
        self.reports.iter().map(get).sum::<u64>() / (self.reports.len() as u64).max(1)
    }

    pub(super) fn mean(&self, get: impl Fn(&DedupReport) -> MemoryUse) -> MemoryUse {
        MemoryUse {
            private: self.mean_of(|r| get(r).private),
            kernel: self.mean_of(|r| get(r).kernel),
            store: self.mean_of(|r| get(r).store),
            metadata: self.mean_of(|r| get(r).metadata),
        }
    }

    /// What an estimate comes to together with what the real operations left.
    pub(super) fn bases(&self, estimated: &Estimated) -> Bases {
        let mut remains = 0;
        for (report, image) in self.reports.iter().zip(&estimated.image_bytes) {
            remains += MemoryUse { store: *image, ..report.after }.total();
        }
        let dedup_bytes = remains / (self.reports.len() as u64).max(1);
        Bases {
            dedup_bytes,
            saved: gone(dedup_bytes, self.mean_of(|r| r.before.total())),
            foreign_pages: mean(estimated.foreign_pages.iter().copied()),
        }
    }
}
