//! Cold starts by policy, pool and function.

use std::collections::BTreeMap;

use medes_simulator::{Run, StartCounts};

use super::{Pool, change, class, less, pools};
use crate::chart::{Bar, bars};
use crate::scale::short;
use crate::svg::escape;

fn panels(pools: &[Pool<'_>]) -> String {
    let mut out = String::from("<div class=\"grid\">");
    for pool in pools {
        let most = pool.runs.iter().map(|r| r.result.starts.cold).max().unwrap_or(1) as f64;
        let fixed = pool.fixed().map(|r| r.result.starts.cold as f64);
        let list: Vec<Bar> = pool
            .runs
            .iter()
            .map(|run| {
                let cold = run.result.starts.cold as f64;
                let text = match fixed {
                    Some(fixed) if cold != fixed => {
                        format!("{}  {}", short(cold), change(less(cold, fixed)))
                    }
                    _ => short(cold),
                };
                Bar { label: run.label.clone(), class: class(&run.label), value: cold, text }
            })
            .collect();
        let title = pool.title();
        out.push_str(&format!(
            "<div class=\"card\"><h3>{}</h3>{}</div>",
            escape(&title),
            bars(&format!("Cold starts, {title}"), &list, most, 480.0)
        ));
    }
    out.push_str("</div>");
    out
}

/// Cold starts by policy on each pool.
pub(super) fn cold_starts(runs: &[Run]) -> Option<String> {
    let pools = pools(runs, false);
    if pools.is_empty() {
        return None;
    }
    Some(format!(
        "<section><h2>Cold starts</h2><p>Requests that found no sandbox, on pools of several sizes. \
         Beside each number: the change against fixed keep-alive on the same pool.</p><p \
         class=\"note\">Medes P1 spends the least memory on a latency target, Medes P2 the least \
         latency on a memory budget. In the paper's form both count what sandboxes could serve, and \
         divide memory by rates; in ours they count what idle sandboxes do serve, and memory goes \
         where it saves the most waiting. Adaptive is the hybrid histogram policy of Serverless in \
         the Wild, greedy-dual that of FaasCache.</p>{}</section>",
        panels(&pools)
    ))
}

/// The same with the costs that the paper measured.
pub(super) fn paper_costs(runs: &[Run]) -> Option<String> {
    let pools = pools(runs, true);
    if pools.is_empty() {
        return None;
    }
    Some(format!(
        "<section><h2>With the paper's costs</h2><p>The same trace, with the paper's times and \
         sizes: dedup saves a third of the memory there, and a restore takes from a tenth to half a \
         second. Functions are larger and run longer, so the pools are larger, too: under the same \
         pressure from fixed keep-alive.</p>{}</section>",
        panels(&pools)
    ))
}

/// Cold starts by the kind of function, on the tightest pool.
pub(super) fn by_function(runs: &[Run]) -> Option<String> {
    let pools = pools(runs, false);
    let pool = pools.iter().filter(|p| p.bytes > 0).min_by_key(|p| p.bytes).or(pools.first())?;
    let mut kinds: BTreeMap<&str, Vec<StartCounts>> = BTreeMap::new();
    for (i, run) in pool.runs.iter().enumerate() {
        for f in &run.result.functions {
            let list = kinds.entry(&f.profile).or_default();
            list.resize(pool.runs.len(), StartCounts::default());
            list[i].cold += f.starts.cold;
            list[i].warm += f.starts.warm;
            list[i].dedup += f.starts.dedup;
        }
    }
    let mut out = format!(
        "<section><h2>By function</h2><p>Cold starts by the function that stands for the trace's, \
         {}. In brackets: the share of its requests.</p><div class=\"scroll\"><table><tr><th></th>",
        escape(&pool.title().to_lowercase().replace("gb", "GB"))
    );
    for run in &pool.runs {
        out.push_str(&format!("<th>{}</th>", escape(&run.label)));
    }
    out.push_str("</tr>");
    for (kind, list) in kinds {
        out.push_str(&format!("<tr><td>{}</td>", escape(kind)));
        let least = list.iter().map(|c| c.cold).min().unwrap_or(0);
        for counts in &list {
            let class = if counts.cold == least { "good" } else { "" };
            let share = counts.cold as f64 / (counts.total().max(1)) as f64 * 100.0;
            out.push_str(&format!(
                "<td class=\"{class}\">{} ({} %)</td>",
                short(counts.cold as f64),
                short(share)
            ));
        }
        out.push_str("</tr>");
    }
    out.push_str("</table></div></section>");
    Some(out)
}
