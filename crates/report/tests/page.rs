//! A page from real simulations.

use medes_core::StartKind;
use medes_report::{Heading, page};
use medes_simulator::{
    Comparison, Experiment, Profile, Run, Served, Silent, carry_out, evaluation,
};
use medes_trace::{Making, Trace, TraceOptions, make};

fn runs() -> Vec<Run> {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), Making { seed: 1, functions: 20, minutes: 30, calls: 2_000 }).unwrap();
    let trace = Trace::open(dir.path()).unwrap();
    let mut runs = Vec::new();
    carry_out(
        &evaluation(1),
        &trace,
        TraceOptions::default(),
        &Profile::measured(),
        &mut Silent,
        &mut |run| {
            runs.push(run);
            Ok(())
        },
    )
    .unwrap();
    let mut live = Comparison::default();
    live.served(&Served {
        request: 0,
        function: "vanilla".to_owned(),
        start: StartKind::Cold,
        startup_us: 50_000,
        execution_us: 6_000,
    });
    let validation = live.finish("a <replay>".to_owned(), true);
    let experiment = Experiment::Validation(Box::new(validation));
    runs.push(Run { experiment, ..runs[0].clone() });
    runs
}

#[test]
fn the_whole_evaluation_is_one_page_by_itself() {
    let mut runs = runs();
    runs[0].result.trace.path = "<script>alert(1)</script>".to_owned();
    let heading = Heading { title: "A & B".to_owned(), origin: vec!["by <me>".to_owned()] };
    let html = page(&heading, &runs);
    assert!(html.starts_with("<!doctype html>") && html.trim_end().ends_with("</html>"));
    assert!(html.contains("<title>A &amp; B</title>") && html.contains("by &lt;me&gt;"));
    for outside in ["http://", "https://", "<script", "@import", "url("] {
        assert!(!html.contains(outside), "{outside}");
    }
    for section in [
        "Beside the paper",
        "Cold starts",
        "Latency",
        "Memory over time",
        "Settings",
        "Live and simulated",
    ] {
        assert!(html.contains(&format!("<h2>{section}</h2>")), "{section}");
    }
    assert!(!html.contains("NaN") && !html.contains("inf"));
    for tag in ["section", "table", "svg", "div", "tr", "ul"] {
        let open =
            html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
        assert_eq!(open, html.matches(&format!("</{tag}>")).count(), "{tag}");
    }
    // What was written to a file makes the same page.
    let text = serde_json::to_string(&runs).unwrap();
    let again: Vec<Run> = serde_json::from_str(&text).unwrap();
    assert_eq!(page(&heading, &again), html);
}

#[test]
fn without_results_it_says_so() {
    assert!(page(&Heading::default(), &[]).contains("There are no results"));
    let one = &runs()[..1];
    assert!(page(&Heading::default(), one).contains("Cold starts"));
}
