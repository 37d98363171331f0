//! The redundancy study on live sandboxes or on any processes.

use anyhow::{Context, Result};
use medes_core::Layout;
use serde::Serialize;

use crate::dump::Dump;
use crate::functions::Function;
use crate::machine::Circumstances;
use crate::redundancy::{CHUNK_SIZES, Index};
use crate::testbed::Testbed;
use crate::{mean, share};

/// Chunk size at which memories are compared with each other.
pub const CHUNK: usize = 64;

/// Requests that the two sandboxes of a function have served.
const REQUESTS: [u32; 2] = [6, 4];

/// One memory in a study.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// A function's or a process's name.
    pub name: String,
    /// Private memory.
    pub bytes: u64,
    /// The share of it that is pages of zeros, which all other figures leave out.
    pub zero: f64,
    /// Redundancy by chunk size, in the order of `chunk_sizes`: against another sandbox of the
    /// same function, or, of a process, against all the others together.
    pub by_chunk_size: Vec<f64>,
    /// Redundancy against each memory of the study, in their order, at the smallest chunk size:
    /// of functions, against a sandbox that is not this one.
    pub against: Vec<f64>,
    /// The mean of that over the others.
    pub against_others: f64,
}

/// Memories that came about in one way.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Study {
    /// How: `without ASLR`, `with ASLR`, `as found`.
    pub setting: String,
    /// The memories.
    pub memories: Vec<Memory>,
    /// The mean over all memories, by chunk size.
    pub mean_by_chunk_size: Vec<f64>,
    /// The mean over all pairs of different memories.
    pub mean_across: f64,
}

/// The whole document.
#[derive(Clone, Debug, Serialize)]
pub struct Analysis {
    /// Chunk sizes, bytes.
    pub chunk_sizes: Vec<usize>,
    /// The studies.
    pub studies: Vec<Study>,
    /// Where and when.
    #[serde(flatten)]
    pub circumstances: Circumstances,
}

/// Compares the functions' sandboxes, without address-space randomisation (all functions have one
/// layout) and with it. `say` hears what is going on.
///
/// # Errors
/// If a sandbox does not do what it should.
pub fn of_functions(
    testbed: &Testbed,
    functions: &[Function],
    say: &dyn Fn(&str),
) -> Result<Analysis> {
    let circumstances = Circumstances::now();
    let settings = [(Layout::Shared, "without ASLR"), (Layout::Random, "with ASLR")];
    let mut studies = Vec::new();
    for (layout, setting) in settings {
        say(&format!("{setting}: reading the memory of {} functions", functions.len()));
        let (mut references, mut subjects) = (Vec::new(), Vec::new());
        for function in functions {
            let [reference, subject] =
                dumps(testbed, function, layout).with_context(|| function.name().to_owned())?;
            references.push(reference);
            subjects.push((function.name().to_owned(), subject));
        }
        say(&format!("{setting}: comparing"));
        studies.push(study(setting, &subjects, &references));
    }
    Ok(Analysis { chunk_sizes: CHUNK_SIZES.into(), studies, circumstances })
}

/// Compares processes with each other. They go on running while they are read.
///
/// # Errors
/// If one is gone or may not be read.
pub fn of_processes(pids: &[i32]) -> Result<Analysis> {
    let circumstances = Circumstances::now();
    let mut memories = Vec::new();
    for pid in pids {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
        let name = name.with_context(|| format!("there is no process {pid}"))?;
        memories.push((format!("{} {pid}", name.trim_end()), Dump::of(&[*pid])?));
    }
    let study = study_of_processes("as found", &memories);
    Ok(Analysis { chunk_sizes: CHUNK_SIZES.into(), studies: vec![study], circumstances })
}

/// The memory of two sandboxes of a function.
fn dumps(testbed: &Testbed, function: &Function, layout: Layout) -> Result<[Dump; 2]> {
    let spec = function.spec(layout);
    let sandboxes = [testbed.start(&spec)?, testbed.start(&spec)?];
    for ((sandbox, requests), first) in sandboxes.iter().zip(REQUESTS).zip([0, 1000]) {
        for n in 0..requests {
            testbed.invoke(&spec, *sandbox, &function.event(first + n))?;
        }
    }
    testbed.settle();
    let [a, b] = sandboxes.map(|sandbox| testbed.inspect(sandbox, Dump::of));
    sandboxes.iter().for_each(|sandbox| testbed.purge(*sandbox));
    Ok([a?, b?])
}

/// Each subject against its own reference and those of the others.
fn study(setting: &str, subjects: &[(String, Dump)], references: &[Dump]) -> Study {
    let indexes: Vec<Index<'_>> = references.iter().map(|r| Index::of(r, CHUNK)).collect();
    let memories = subjects.iter().zip(references).map(|((name, subject), reference)| {
        let by_chunk_size =
            CHUNK_SIZES.map(|chunk| Index::of(reference, chunk).redundancy(subject).share()).into();
        let against = indexes.iter().map(|index| index.redundancy(subject).share()).collect();
        memory(name, subject, by_chunk_size, against)
    });
    Study::of(setting, memories.collect())
}

/// Each process against each other, and all others together.
fn study_of_processes(setting: &str, processes: &[(String, Dump)]) -> Study {
    let indexes: Vec<Index<'_>> = processes.iter().map(|(_, d)| Index::of(d, CHUNK)).collect();
    let memories = processes.iter().enumerate().map(|(own, (name, subject))| {
        let others = processes.iter().enumerate().filter(|(n, _)| *n != own);
        let others = Dump::joined(others.map(|(_, (_, dump))| dump));
        let by_chunk_size =
            CHUNK_SIZES.map(|chunk| Index::of(&others, chunk).redundancy(subject).share()).into();
        let against = indexes.iter().map(|index| index.redundancy(subject).share()).collect();
        memory(name, subject, by_chunk_size, against)
    });
    Study::of(setting, memories.collect())
}

fn memory(name: &str, dump: &Dump, by_chunk_size: Vec<f64>, against: Vec<f64>) -> Memory {
    Memory {
        name: name.to_owned(),
        bytes: dump.bytes(),
        zero: share(dump.zero_pages() as f64, dump.pages().len() as f64),
        by_chunk_size,
        against,
        against_others: 0.0,
    }
}

impl Study {
    fn of(setting: &str, mut memories: Vec<Memory>) -> Self {
        for (own, memory) in memories.iter_mut().enumerate() {
            let others = memory.against.iter().enumerate().filter(|(n, _)| *n != own);
            memory.against_others = mean(others.map(|(_, share)| *share));
        }
        let mean_by_chunk_size =
            (0..CHUNK_SIZES.len()).map(|n| mean(memories.iter().map(|m| m.by_chunk_size[n])));
        Self {
            setting: setting.to_owned(),
            mean_by_chunk_size: mean_by_chunk_size.collect(),
            mean_across: mean(memories.iter().map(|m| m.against_others)),
            memories,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use medes_pages::{PAGE_SIZE, Page};

    fn dump(seeds: impl Iterator<Item = u64>) -> Dump {
        let page = |seed: u64| {
            let mut page: Page = [0; PAGE_SIZE];
            for (word, n) in page.chunks_exact_mut(8).zip(seed * 512..) {
                word.copy_from_slice(&crate::registry::mix(n).to_le_bytes());
            }
            page
        };
        let mut pages: Vec<Page> = seeds.map(page).collect();
        pages.push([0; PAGE_SIZE]);
        Dump::from_regions([(0x1000, pages)])
    }

    #[test]
    fn functions_are_compared_with_another_sandbox() {
        // 19 pages of content and one of zeros each; half of `b` is in `a`.
        let subjects = [("a".to_owned(), dump(0..20)), ("b".to_owned(), dump(10..30))];
        let references = [dump(0..20), dump(10..30)];
        let study = study("test", &subjects, &references);
        let a = &study.memories[0];
        assert!((a.zero - 1.0 / 21.0).abs() < 1e-3);
        assert!(a.by_chunk_size.iter().all(|s| *s > 0.999), "{a:?}");
        assert!((a.against[1] - 0.5).abs() < 0.01 && (a.against_others - 0.5).abs() < 0.01);
        assert!((study.mean_across - 0.5).abs() < 0.01);
    }

    #[test]
    fn a_process_is_compared_with_all_others_together() {
        let processes = [
            ("a".to_owned(), dump(0..20)),
            ("b".to_owned(), dump(0..10)),
            ("c".to_owned(), dump(10..20)),
        ];
        let study = study_of_processes("as found", &processes);
        assert!(study.memories[0].by_chunk_size[0] > 0.99);
        assert!((study.memories[0].against_others - 0.5).abs() < 0.01);
    }
}
