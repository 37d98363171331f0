//! The redundancy study as a page to look at: one file, no script, light and dark.

mod svg;

use std::fmt::Write;

use crate::analysis::{Analysis, CHUNK, Memory, Study};
use svg::{Heatmap, Lines, Series};

const STYLE: &str = include_str!("style.css");

/// Text as it may stand in HTML.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

/// The page.
#[must_use]
pub fn page(analysis: &Analysis) -> String {
    let c = &analysis.circumstances;
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>What memory has in common</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <main>\n<h1>What memory has in common</h1>\n\
         <p class=\"meta\">{} &middot; Linux {} &middot; {} &middot; medes {}</p>\n",
        escape(&c.machine.cpu),
        escape(&c.machine.kernel),
        escape(&c.date),
        escape(c.version),
    );
    by_chunk_size(analysis, &mut out);
    across(analysis, &mut out);
    figures(analysis, &mut out);
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

fn is_of_functions(analysis: &Analysis) -> bool {
    analysis.studies.len() > 1
}

fn by_chunk_size(analysis: &Analysis, out: &mut String) {
    let (title, text) = if is_of_functions(analysis) {
        (
            "Two sandboxes of one function, by chunk size",
            "The share of a sandbox&rsquo;s private memory that another sandbox of its function \
             has too. Of every 2K bytes, K are sampled, looked up by hash, compared, and the match \
             extended.",
        )
    } else {
        (
            "Each process and all the others, by chunk size",
            "The share of a process&rsquo;s private memory that the others have too. Of every 2K \
             bytes, K are sampled, looked up by hash, compared, and the match extended.",
        )
    };
    let _ = write!(out, "<section>\n<h2>{title}</h2>\n<p>{text}</p>\n");
    if analysis.studies.len() > 1 {
        out.push_str("<p class=\"legend\">");
        for (n, study) in analysis.studies.iter().enumerate() {
            let name = escape(&study.setting);
            let _ = write!(out, "<span><i class=\"s{n}\"></i>{name}</span>");
        }
        out.push_str("</p>\n");
    }
    out.push_str("<div class=\"panels\">\n");
    let mean = |s: &Study| s.mean_by_chunk_size.clone();
    panel(analysis, "mean", &mean, out);
    let Some(first) = analysis.studies.first() else { return };
    for (n, memory) in first.memories.iter().enumerate() {
        let of = |s: &Study| s.memories.get(n).map_or(Vec::new(), |m| m.by_chunk_size.clone());
        panel(analysis, &memory.name, &of, out);
    }
    out.push_str("</div>\n</section>\n");
}

fn panel(analysis: &Analysis, name: &str, of: &dyn Fn(&Study) -> Vec<f64>, out: &mut String) {
    let lines = Lines {
        name,
        x: &analysis.chunk_sizes,
        series: analysis
            .studies
            .iter()
            .map(|study| Series { name: &study.setting, values: of(study) })
            .collect(),
    };
    let _ = write!(
        out,
        "<figure{}><figcaption>{}</figcaption>\n{}</figure>\n",
        if name == "mean" { " class=\"mean\"" } else { "" },
        escape(name),
        lines.draw()
    );
}

fn across(analysis: &Analysis, out: &mut String) {
    let text = if is_of_functions(analysis) {
        "The share of the row&rsquo;s memory that a sandbox of the column&rsquo;s function has \
         too; on the diagonal, another sandbox of the same function."
    } else {
        "The share of the row&rsquo;s memory that the column&rsquo;s process has too."
    };
    let _ = write!(
        out,
        "<section>\n<h2>Everybody with everybody, {CHUNK} B chunks</h2>\n<p>{text}</p>\n\
         <div class=\"maps\">\n"
    );
    for study in &analysis.studies {
        let names: Vec<&str> = study.memories.iter().map(|m| m.name.as_str()).collect();
        let rows: Vec<&[f64]> = study.memories.iter().map(|m| m.against.as_slice()).collect();
        let map = Heatmap { names: &names, rows: &rows };
        let _ = write!(
            out,
            "<figure><figcaption>{}, mean of different ones {}</figcaption>\n{}</figure>\n",
            escape(&study.setting),
            percent(study.mean_across),
            map.draw()
        );
    }
    out.push_str("</div>\n</section>\n");
}

fn figures(analysis: &Analysis, out: &mut String) {
    out.push_str(
        "<section>\n<h2>The figures</h2>\n<p>Private memory is what belongs to the process alone; \
         files that several processes map are shared by the kernel anyway and are no part of it. \
         Pages of zeros are a share of it, and every other figure leaves them out.</p>\n<div class=\"scroll\"><table>\n<thead><tr>\
         <th></th><th></th><th>private MB</th><th>zero pages</th>",
    );
    for size in &analysis.chunk_sizes {
        let _ = write!(out, "<th>{}</th>", svg::size(*size));
    }
    let _ = write!(out, "<th>others, {CHUNK} B</th></tr></thead>\n<tbody>\n");
    for study in &analysis.studies {
        for memory in &study.memories {
            row(study, memory, out);
        }
    }
    out.push_str("</tbody>\n</table></div>\n</section>\n");
}

fn row(study: &Study, memory: &Memory, out: &mut String) {
    let _ = write!(
        out,
        "<tr><th>{}</th><td class=\"setting\">{}</td><td>{:.1}</td><td>{}</td>",
        escape(&memory.name),
        escape(&study.setting),
        memory.bytes as f64 / 1e6,
        percent(memory.zero)
    );
    for share in memory.by_chunk_size.iter().chain([&memory.against_others]) {
        let _ = write!(out, "<td>{}</td>", percent(*share));
    }
    out.push_str("</tr>\n");
}

fn percent(share: f64) -> String {
    format!("{:.0}&nbsp;%", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Circumstances;
    use crate::redundancy::CHUNK_SIZES;

    fn study(setting: &str) -> Study {
        let memory = |name: &str| Memory {
            name: name.to_owned(),
            bytes: 20_000_000,
            zero: 0.1,
            by_chunk_size: vec![0.9; 7],
            against: vec![1.0, 0.25],
            against_others: 0.25,
        };
        Study {
            setting: setting.to_owned(),
            memories: vec![memory("one"), memory("<two> & \"more\"")],
            mean_by_chunk_size: vec![0.9; 7],
            mean_across: 0.25,
        }
    }

    #[test]
    fn the_page_is_complete_and_its_own() {
        let analysis = Analysis {
            chunk_sizes: CHUNK_SIZES.into(),
            studies: vec![study("without ASLR"), study("with ASLR")],
            circumstances: Circumstances::now(),
        };
        let page = page(&analysis);
        // A mean and two memories, two maps.
        assert_eq!(page.matches("<svg").count(), 3 + 2);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert_eq!(page.matches("<polyline").count(), 3 * 2);
        assert!(page.contains("&lt;two&gt; &amp; &quot;more&quot;"));
        assert!(!page.contains("<two>") && !page.contains("<script") && !page.contains("src="));
        assert!(!page.contains("NaN"));
    }
}
