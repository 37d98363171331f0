//! What deduplication saves: the paper's Table 3, and its sensitivity studies.
//!
//! For each layout, every function gets a base sandbox and others, which have served other inputs
//! and other numbers of requests. Each of these is deduplicated for real by a node that has a base
//! of its own function only, restored, and asked once more. What other bases would have left is
//! estimated on the same sandboxes, frozen, with the dedup operation itself stopped short of
//! dropping anything: the memory of process and kernel that remains is taken from the real
//! operation, the size of the image from the estimate.

mod sensitivity;
mod subject;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use medes_core::{FunctionId, Layout, MemoryUse};
use medes_pages::FingerprintConfig;
use medes_registry::Scope;
use serde::Serialize;

use crate::bank::{Bank, Breakdown};
use crate::dump::Dump;
use crate::functions::Function;
use crate::machine::Circumstances;
use crate::testbed::Testbed;
use crate::{mean, share};

pub use sensitivity::Sensitivity;
use subject::{Measured, Sandboxes};

/// Requests that the base sandbox has served.
const BASE_REQUESTS: u32 = 8;
/// Requests that each of the other sandboxes has served.
const REQUESTS: [u32; 2] = [3, 20];

/// Every layout.
pub const LAYOUTS: [Layout; 3] = [Layout::Function, Layout::Shared, Layout::Random];

/// Dedup sandboxes among whom a base snapshot is shared out.
const AMORTISED: [u32; 3] = [1, 5, 40];

/// Pages by what they are kept as, mean of the sandboxes.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Pages {
    /// Dropped.
    pub dropped: u64,
    /// Of those, zero.
    pub zero: u64,
    /// Equal to a base page.
    pub equal: u64,
    /// Patches against a base page.
    pub patched: u64,
    /// Without a base page.
    pub unique: u64,
    /// Not dropped, because the kernel itself touches them.
    pub kept: u64,
}

/// What some choice of bases leaves of a sandbox.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Bases {
    /// What remains, bytes.
    pub dedup_bytes: u64,
    /// The share that is saved.
    pub saved: f64,
    /// Of the pages that have a base page, the share whose base page is another function's.
    pub foreign_pages: f64,
}

/// One function with one layout; figures are means of its sandboxes.
#[derive(Clone, Debug, Serialize)]
pub struct LayoutSavings {
    /// Everything charged to a sandbox when it is warm: private pages and kernel memory.
    pub warm_bytes: u64,
    /// What remains of it when it is deduplicated, with kept pages, page tables, patches and all
    /// metadata.
    pub dedup_bytes: u64,
    /// The share that is saved.
    pub saved: f64,
    /// What the base snapshot costs: its pages, its table, its entries in the registry.
    pub base_bytes: u64,
    /// The share that is saved when the base snapshot is shared out among so many dedup sandboxes.
    pub saved_with_base: BTreeMap<u32, f64>,
    /// What the warm memory consists of.
    pub warm: MemoryUse,
    /// What remains consists of.
    pub dedup: MemoryUse,
    /// What became of the pages.
    pub pages: Pages,
    /// Bases of the same function only, estimated: what the estimates of the others are worth.
    pub same_function_estimated: Bases,
    /// Bases of the other functions only, none of the same.
    pub other_functions: Bases,
    /// Bases of all functions.
    pub any_function: Bases,
    /// The first sandbox's pages against a base of the same function.
    pub same_function_pages: Breakdown,
    /// The first sandbox's pages against bases of other functions.
    pub other_functions_pages: Breakdown,
}

/// One function.
#[derive(Clone, Debug, Serialize)]
pub struct FunctionSavings {
    /// Its name.
    pub name: String,
    /// With layout `function` and a base of the same function, the base apart.
    pub warm_bytes: u64,
    /// What remains.
    pub dedup_bytes: u64,
    /// The share that is saved.
    pub saved: f64,
    /// The base.
    pub base_bytes: u64,
    /// All layouts, by name.
    pub layouts: BTreeMap<&'static str, LayoutSavings>,
}

/// How many requests sandboxes had served. No two had the same input.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Requests {
    /// The base sandbox.
    pub base: u32,
    /// Each of the others.
    pub others: [u32; 2],
}

/// The whole document.
#[derive(Clone, Debug, Serialize)]
pub struct SavingsReport {
    /// Layout `function`, base of the same function: mean of the functions.
    pub saved_mean: f64,
    /// The least of them.
    pub saved_worst: f64,
    /// Layout `shared`, bases of other functions only: mean.
    pub saved_other_shared_mean: f64,
    /// Layout `random`, base of the same function: mean.
    pub saved_random_mean: f64,
    /// Layout `shared`, bases of all functions: mean share of pages whose base is another's.
    pub foreign_pages_shared_mean: f64,
    /// By function.
    pub functions: Vec<FunctionSavings>,
    /// Other fingerprints.
    pub sensitivity: Vec<Sensitivity>,
    /// What sandboxes had been through.
    pub requests: Requests,
    /// Answers given after a restore, all equal to those of a sandbox that never was deduplicated.
    pub answers_checked: u32,
    /// Where and when.
    #[serde(flatten)]
    pub circumstances: Circumstances,
}

/// A layout's name.
#[must_use]
pub fn layout_name(layout: Layout) -> &'static str {
    match layout {
        Layout::Function => "function",
        Layout::Shared => "shared",
        Layout::Random => "random",
    }
}

/// Measures everything. `say` hears what is going on.
///
/// # Errors
/// If a sandbox does not do what it should: above all if it answers wrongly after a restore.
pub fn measure(
    testbed: &Testbed,
    functions: &[Function],
    vary: bool,
    say: &dyn Fn(&str),
) -> Result<SavingsReport> {
    let circumstances = Circumstances::now();
    let mut by_function: Vec<BTreeMap<&'static str, LayoutSavings>> =
        vec![BTreeMap::new(); functions.len()];
    let mut sensitivity = Vec::new();
    let mut answers_checked = 0;
    for layout in LAYOUTS {
        let name = layout_name(layout);
        say(&format!("layout {name}: starting sandboxes"));
        let group = Group::start(testbed, functions, layout)?;
        if vary {
            say(&format!("layout {name}: other fingerprints"));
            sensitivity.extend(sensitivity::measure(testbed, &group, layout)?);
        }
        let estimates = group.estimate(testbed, say)?;
        for ((sandboxes, estimated), all) in
            group.sandboxes.iter().zip(estimates).zip(&mut by_function)
        {
            say(&format!("layout {name}: {}", sandboxes.function.name()));
            let measured = sandboxes.dedup(testbed)?;
            answers_checked += measured.answers_checked;
            all.insert(name, layout_savings(&measured, estimated));
        }
        for s in &mut sensitivity {
            s.complete(&by_function);
        }
    }
    let functions: Vec<FunctionSavings> = functions
        .iter()
        .zip(by_function)
        .map(|(function, layouts)| function_savings(function.name(), layouts))
        .collect();
    let over = |get: &dyn Fn(&FunctionSavings) -> f64| mean(functions.iter().map(get));
    Ok(SavingsReport {
        saved_mean: over(&|f| f.saved),
        saved_worst: functions.iter().map(|f| f.saved).fold(1.0, f64::min),
        saved_other_shared_mean: over(&|f| f.layouts["shared"].other_functions.saved),
        saved_random_mean: over(&|f| f.layouts["random"].saved),
        foreign_pages_shared_mean: over(&|f| f.layouts["shared"].any_function.foreign_pages),
        functions,
        sensitivity,
        requests: Requests { base: BASE_REQUESTS, others: REQUESTS },
        answers_checked,
        circumstances: circumstances.until_now(),
    })
}

fn function_savings(name: &str, layouts: BTreeMap<&'static str, LayoutSavings>) -> FunctionSavings {
    let headline = &layouts[layout_name(Layout::Function)];
    FunctionSavings {
        name: name.to_owned(),
        warm_bytes: headline.warm_bytes,
        dedup_bytes: headline.dedup_bytes,
        saved: headline.saved,
        base_bytes: headline.base_bytes,
        layouts,
    }
}

/// An estimate: image bytes of each sandbox, and its share of foreign pages.
#[derive(Clone, Debug, Default)]
struct Estimated {
    image_bytes: Vec<u64>,
    foreign_pages: Vec<f64>,
}

/// What was estimated on the sandboxes of one function.
struct Estimates {
    same: Estimated,
    other: Estimated,
    any: Estimated,
    same_pages: Breakdown,
    other_pages: Breakdown,
}

/// The sandboxes of all functions with one layout, all warm.
struct Group<'f> {
    sandboxes: Vec<Sandboxes<'f>>,
    /// The memory of each function's base sandbox.
    bases: Vec<(FunctionId, Dump)>,
}

impl<'f> Group<'f> {
    fn start(testbed: &Testbed, functions: &'f [Function], layout: Layout) -> Result<Self> {
        let sandboxes = functions
            .iter()
            .map(|f| Sandboxes::start(testbed, f, layout).with_context(|| f.name().to_owned()))
            .collect::<Result<Vec<_>>>()?;
        testbed.settle();
        let dump = |s: &Sandboxes<'_>| Ok((s.spec.id, testbed.inspect(s.base, Dump::of)?));
        let bases = sandboxes.iter().map(dump).collect::<Result<_>>()?;
        Ok(Self { sandboxes, bases })
    }

    /// A bank with the bases that are asked for.
    fn bank(
        &self,
        fingerprints: FingerprintConfig,
        wanted: impl Fn(FunctionId) -> bool,
    ) -> Result<Bank> {
        let chosen = self.bases.iter().filter(|(id, _)| wanted(*id));
        Bank::with(fingerprints, chosen.map(|(id, dump)| (*id, dump)))
    }

    fn estimate(&self, testbed: &Testbed, say: &dyn Fn(&str)) -> Result<Vec<Estimates>> {
        let config = FingerprintConfig::default();
        let all = self.bank(config, |_| true)?;
        let estimates = self.sandboxes.iter().map(|sandboxes| {
            say(&format!("bases of other functions: {}", sandboxes.function.name()));
            let id = sandboxes.spec.id;
            // Banks of their own: what is not there can't be found, by any way.
            let same = self.bank(config, |of| of == id)?;
            let other = self.bank(config, |of| of != id)?;
            let first = testbed.inspect(sandboxes.others[0], Dump::of)?;
            Ok(Estimates {
                same: sandboxes.estimate(testbed, &same, Scope::SameFunction)?,
                other: sandboxes.estimate(testbed, &other, Scope::OtherFunctions)?,
                any: sandboxes.estimate(testbed, &all, Scope::Any)?,
                same_pages: same.break_down(&first, id, Scope::SameFunction)?,
                other_pages: other.break_down(&first, id, Scope::OtherFunctions)?,
            })
        });
        estimates.collect()
    }
}

fn layout_savings(measured: &Measured, estimates: Estimates) -> LayoutSavings {
    let warm = measured.mean(|r| r.before);
    let dedup = measured.mean(|r| r.after);
    let saved = |remains: f64| crate::round(1.0 - remains / warm.total() as f64, 4);
    let left = dedup.total() as f64;
    let base = measured.base_bytes as f64;
    let page = |get: fn(&medes_node::DedupReport) -> u64| measured.mean_of(get);
    let bases = |estimated: &Estimated| measured.bases(estimated);
    LayoutSavings {
        warm_bytes: warm.total(),
        dedup_bytes: dedup.total(),
        saved: saved(left),
        base_bytes: measured.base_bytes,
        saved_with_base: AMORTISED.map(|n| (n, saved(left + base / f64::from(n)))).into(),
        warm,
        dedup,
        pages: Pages {
            dropped: page(|r| r.pages),
            zero: page(|r| r.zero_pages),
            equal: page(|r| r.equal_pages),
            patched: page(|r| r.patched_pages),
            unique: page(|r| r.unique_pages),
            kept: page(|r| r.kept_pages),
        },
        same_function_estimated: bases(&estimates.same),
        other_functions: bases(&estimates.other),
        any_function: bases(&estimates.any),
        same_function_pages: estimates.same_pages,
        other_functions_pages: estimates.other_pages,
    }
}

/// The share of `whole` that is gone when `remains` remains.
fn gone(remains: u64, whole: u64) -> f64 {
    crate::round(1.0 - share(remains as f64, whole as f64), 4)
}

#[cfg(test)]
mod tests;
