//! The engine's speed on one core, over the memory of real functions.
//!
//! Every operation goes over the pages of all sandboxes, one after the other, so that pages come
//! from memory and not from the processor's cache: a sandbox that is deduplicated or restored has
//! been idle. What a dedup operation does is timed as it does it, on batches of pages that have
//! just been read into a buffer. All that is done several times, and of each batch the median time
//! counts: a batch takes a millisecond or so, so being interrupted by other load falls out.
//! `memcpy` is timed in the same way, page by page as all else, from the pages where they are into
//! memory that was used before.

mod timing;

use std::time::Duration;

use anyhow::{Context, Result};
use medes_core::{FunctionSpec, Layout, SandboxId};
use medes_pages::FingerprintConfig;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::Serialize;

use crate::bank::Bank;
use crate::dump::Dump;
use crate::functions::Function;
use crate::machine::Circumstances;
use crate::registry::{self, RegistryFigures};
use crate::testbed::{BASE, ROOMY, TakenBack, Testbed};
use crate::{round, share};
use timing::{Material, Times};

/// Requests that the base sandbox and the other one serve before their memory is taken.
const REQUESTS: [u32; 2] = [6, 4];

/// How often a dedup operation is cancelled: at moments spread evenly over its usual time.
const CANCELS: u32 = 20;

/// How long after an operation that was cancelled the next one begins.
const BETWEEN_CANCELS: Duration = Duration::from_millis(100);

/// Sandboxes of each function that are deduplicated, each twice.
const OPERATIONS: usize = 3;

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How often each batch is timed.
    pub rounds: usize,
    /// Entries in the registry that is timed, at least.
    pub entries: u64,
    /// The layout of the sandboxes.
    pub layout: Layout,
}

/// Speeds over some pages, one core, in 10^9 bytes of pages a second.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Speeds {
    /// Copying the pages.
    pub memcpy_gbps: f64,
    /// Copying that stays in the cache.
    pub memcpy_cached_gbps: f64,
    /// Fingerprinting them, just read.
    pub fingerprint_gbps: f64,
    /// Fingerprinting them where they are.
    pub fingerprint_cold_gbps: f64,
    /// Encoding and verifying, as a dedup operation does: zero, same place, equal, fingerprint.
    pub encode_gbps: f64,
    /// The same for a function whose base pages are not tried at the same address.
    pub encode_elsewhere_gbps: f64,
    /// Bringing all of them back: zeroing, copying, decoding.
    pub decode_gbps: f64,
    /// Decoding those that are patches.
    pub decode_patches_gbps: f64,
}

/// Whole dedup operations on sandboxes of one function: the figures are those of the median one.
#[derive(Clone, Debug, Serialize)]
pub struct WholeOperation {
    /// The sandbox's function.
    pub function: String,
    /// What was charged to the sandbox before, bytes.
    pub warm_bytes: u64,
    /// What remains, bytes; the base snapshot apart.
    pub dedup_bytes: u64,
    /// The share that is saved.
    pub saved: f64,
    /// Pages that were dropped.
    pub pages: u64,
    /// From beginning to end, milliseconds.
    pub total_ms: f64,
    /// Processor time for it, milliseconds: what `total_ms` would be on an idle machine.
    pub cpu_ms: f64,
    /// Of that, reading and encoding: a request that comes takes the sandbox back.
    pub encode_ms: f64,
    /// Of that, with all threads stopped: a request that comes waits for a step of it.
    pub pause_ms: f64,
    /// From a request's coming, at any moment before pages are dropped, until the sandbox runs as
    /// if nothing had happened: the longest, milliseconds.
    pub cancel_ms: f64,
    /// How many there were.
    pub cancelled: usize,
    /// From a request's coming while pages are being dropped until the sandbox runs, with those that
    /// are gone coming back as it touches them: the longest, milliseconds.
    pub late_ms: f64,
    /// How many there were.
    pub late: usize,
    /// A restore until the sandbox runs, milliseconds; the median. Pages outside of its working
    /// set come back later.
    pub restore_ms: f64,
    /// The next dedup operation on the same sandbox, after a restore and one request: from
    /// beginning to end, milliseconds; the median.
    pub again_ms: f64,
    /// How many sandboxes were deduplicated.
    pub operations: usize,
}

/// What was measured on one function.
#[derive(Clone, Debug, Serialize)]
pub struct FunctionFigures {
    /// Its name.
    pub name: String,
    /// Private pages of the sandbox.
    pub pages: usize,
    /// Bytes of patches that remain.
    pub patch_bytes: u64,
    /// Speeds over its pages.
    #[serde(flatten)]
    pub speeds: Speeds,
    /// Whole operations.
    pub dedup: WholeOperation,
}

/// The whole document.
#[derive(Clone, Debug, Serialize)]
pub struct EngineReport {
    /// Speeds over the pages of all functions.
    #[serde(flatten)]
    pub speeds: Speeds,
    /// Fingerprinting against copying.
    pub fingerprint_to_memcpy: f64,
    /// Encoding against copying.
    pub encode_to_memcpy: f64,
    /// Decoding against copying.
    pub decode_to_memcpy: f64,
    /// The registry.
    #[serde(flatten)]
    pub registry: RegistryFigures,
    /// Whole operations on the sandbox that is nearest to 100 MB.
    pub dedup: WholeOperation,
    /// By function.
    pub functions: Vec<FunctionFigures>,
    /// The sandboxes' layout.
    pub layout: Layout,
    /// How often each batch was timed; the median counts.
    pub rounds: usize,
    /// Where and when.
    #[serde(flatten)]
    pub circumstances: Circumstances,
}

/// Measures everything. `say` hears what is going on.
///
/// # Errors
/// If a sandbox does not do what it should.
pub fn measure(
    testbed: &Testbed,
    functions: &[Function],
    plan: Plan,
    say: &dyn Fn(&str),
) -> Result<EngineReport> {
    let circumstances = Circumstances::now();
    let mut materials = Vec::new();
    let mut operations: Vec<WholeOperation> = Vec::new();
    for function in functions {
        say(function.name());
        let (material, operation) =
            one(testbed, function, plan.layout).with_context(|| function.name().to_owned())?;
        materials.push(material);
        operations.push(operation);
    }
    say("timing");
    let times = timing::time(&materials, plan.rounds)?;
    say("the registry");
    let registry = registry::measure(plan.entries)?;
    let speeds = times.iter().sum::<Times>().speeds();
    let distance = |o: &&WholeOperation| o.warm_bytes.abs_diff(100_000_000);
    let dedup = operations.iter().min_by_key(distance).context("no function")?.clone();
    let all = operations.into_iter().zip(&materials).zip(&times);
    let figures = all.map(|((dedup, material), times)| FunctionFigures {
        name: dedup.function.clone(),
        pages: material.pages(),
        patch_bytes: material.patch_bytes(),
        speeds: times.speeds(),
        dedup,
    });
    Ok(EngineReport {
        speeds,
        fingerprint_to_memcpy: share(speeds.fingerprint_gbps, speeds.memcpy_gbps),
        encode_to_memcpy: share(speeds.encode_gbps, speeds.memcpy_gbps),
        decode_to_memcpy: share(speeds.decode_gbps, speeds.memcpy_gbps),
        registry,
        dedup,
        functions: figures.collect(),
        layout: plan.layout,
        rounds: plan.rounds,
        circumstances: circumstances.until_now(),
    })
}

/// Takes the memory of two sandboxes of a function, one to be a base and one to be deduplicated,
/// and then does the real thing on them.
fn one(
    testbed: &Testbed,
    function: &Function,
    layout: Layout,
) -> Result<(Material, WholeOperation)> {
    let spec = function.spec(layout);
    let sandboxes = [testbed.start(&spec)?, testbed.start(&spec)?];
    for ((sandbox, requests), first) in sandboxes.iter().zip(REQUESTS).zip([0, 1000]) {
        for n in 0..requests {
            testbed.invoke(&spec, *sandbox, &function.event(first + n))?;
        }
    }
    testbed.settle();
    let base = testbed.inspect(sandboxes[0], Dump::of)?;
    let subject = testbed.inspect(sandboxes[1], Dump::of)?;
    let bank = Bank::with(FingerprintConfig::default(), [(spec.id, &base)])?;
    let material = Material::new(bank, subject, spec.id)?;
    let operation = operate(testbed, function, &spec, sandboxes)?;
    Ok((material, operation))
}

/// Whole operations on the second sandbox and on others like it, against a base of the first. All
/// are gone then.
fn operate(
    testbed: &Testbed,
    function: &Function,
    spec: &FunctionSpec,
    [base, subject]: [SandboxId; 2],
) -> Result<WholeOperation> {
    testbed.dedup(base, BASE)?;
    let another = |first: u32| -> Result<SandboxId> {
        let sandbox = testbed.start(spec)?;
        for request in 0..REQUESTS[1] {
            testbed.invoke(spec, sandbox, &function.event(first + request))?;
        }
        testbed.settle();
        Ok(sandbox)
    };
    let mut all = Vec::new();
    let mut again = Vec::new();
    let mut sandbox = subject;
    for n in 0..OPERATIONS as u32 {
        if n > 0 {
            sandbox = another(1000 * (n + 1))?;
        }
        let begin = processor_time();
        let done = testbed.dedup(sandbox, ROOMY)?;
        let cpu = processor_time().saturating_sub(begin);
        let restored = testbed.restore(sandbox)?;
        all.push((done, cpu, restored.total_us));
        testbed.invoke(spec, sandbox, &function.event(1000 * (n + 1) + REQUESTS[1]))?;
        // All memory comes back in the meantime.
        testbed.settle();
        again.push(testbed.dedup(sandbox, ROOMY)?.total_us);
        testbed.purge(sandbox);
    }
    let ms = |us: u64| round(us as f64 / 1000.0, 2);
    let mut restores: Vec<u64> = all.iter().map(|(.., us)| *us).collect();
    restores.sort_unstable();
    again.sort_unstable();
    all.sort_by_key(|(done, ..)| done.total_us);
    let (done, cpu, _) = all[OPERATIONS / 2];
    let (mut cancels, mut late) = (Vec::new(), Vec::new());
    sandbox = another(1000)?;
    for n in 1..=CANCELS {
        let usual = Duration::from_micros(done.total_us);
        let taken = testbed.cancel_dedup(sandbox, usual * n / (CANCELS + 1))?;
        // What it put away after it had answered.
        std::thread::sleep(BETWEEN_CANCELS);
        let lacked_pages = testbed.has_image(sandbox);
        match taken {
            TakenBack::After(time) if lacked_pages => late.push(time),
            TakenBack::After(time) => cancels.push(time),
            TakenBack::Over => {}
        }
        if lacked_pages {
            // The next dedup of this one would be another kind of operation.
            testbed.purge(sandbox);
            sandbox = another(1000 * (n + 1))?;
        }
    }
    testbed.purge(sandbox);
    testbed.purge(base);
    let longest = |times: &[Duration]| {
        round(times.iter().max().copied().unwrap_or_default().as_secs_f64() * 1e3, 3)
    };
    let (before, after) = (done.before.total(), done.after.total());
    Ok(WholeOperation {
        function: function.name().to_owned(),
        warm_bytes: before,
        dedup_bytes: after,
        saved: round(1.0 - share(after as f64, before as f64), 4),
        pages: done.pages,
        total_ms: ms(done.total_us),
        cpu_ms: round(cpu.as_secs_f64() * 1e3, 2),
        encode_ms: ms(done.encode_us),
        pause_ms: ms(done.commit_us),
        cancel_ms: longest(&cancels),
        cancelled: cancels.len(),
        late_ms: longest(&late),
        late: late.len(),
        restore_ms: ms(restores[OPERATIONS / 2]),
        again_ms: ms(again[OPERATIONS / 2]),
        operations: OPERATIONS,
    })
}

/// What this process has used of the processors.
fn processor_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF);
    let time = usage.map(|usage| usage.user_time() + usage.system_time());
    time.map_or(Duration::ZERO, |time| Duration::from_micros(time.num_microseconds() as u64))
}
