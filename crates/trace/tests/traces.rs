//! Traces from files, good and bad.

use std::path::PathBuf;

use medes_trace::{Arrival, Format, Making, Trace, TraceError, TraceOptions, Trigger, make};
use proptest::prelude::*;

fn file(dir: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn all(trace: &Trace, options: TraceOptions) -> Vec<Arrival> {
    let mut arrivals = trace.arrivals(options).unwrap();
    std::iter::from_fn(|| arrivals.next().unwrap()).collect()
}

fn problem(text: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "trace.csv", text);
    let message = Trace::open(&path).unwrap_err().to_string();
    message.rsplit_once('/').map_or(message.clone(), |(_, m)| m.to_owned())
}

#[test]
fn azure_2019_with_durations_and_memory_and_any_minutes() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(
        &dir,
        "invocations.csv",
        "HashOwner,HashApp,HashFunction,Trigger,480,481,482\no,a,f,timer,1,0,2\no,a,g,http,0,5,0\n",
    );
    file(
        &dir,
        "durations.csv",
        "HashOwner,HashApp,HashFunction,Average,Count,Minimum,Maximum,percentile_Average_0,\
         percentile_Average_1,percentile_Average_25,percentile_Average_50,percentile_Average_75,\
         percentile_Average_99,percentile_Average_100\no,a,f,5,3,-1,9,-1,0,4,5,6,8,9\n",
    );
    file(&dir, "memory.csv", "HashOwner,HashApp,SampleCount,AverageAllocatedMb\no,a,1,100\n");
    for path in [dir.path().to_owned(), path] {
        let trace = Trace::open(&path).unwrap();
        assert_eq!((trace.format, trace.total(), trace.length_ms), (Format::Azure2019, 8, 180_000));
        let f = &trace.functions[0];
        assert_eq!((f.trigger, f.arrivals, f.memory), (Trigger::Timer, 3, Some(100 << 20)));
        assert_eq!(f.duration_ms.as_ref().unwrap().median(), 5.0);
        assert_eq!(trace.repairs.negative_durations, 1);
        assert_eq!(trace.repairs.without_durations, 1);
        let list = all(&trace, TraceOptions::default());
        assert_eq!(list.len(), 8);
        assert!(list.is_sorted_by_key(|a| a.at_us));
        let timer: Vec<_> = list.iter().filter(|a| a.function == 0).collect();
        assert_eq!(timer[2].at_us - timer[1].at_us, 30_000_000);
        assert_eq!(all(&trace, TraceOptions::default()), list);
        let other = TraceOptions { seed: 2, ..TraceOptions::default() };
        assert_ne!(all(&trace, other), list);
    }
}

#[test]
fn days_follow_each_other_and_a_function_may_have_two_lines() {
    let dir = tempfile::tempdir().unwrap();
    let header = "HashOwner,HashApp,HashFunction,Trigger,1,2\n";
    file(&dir, "d01.csv", &format!("{header}o,a,f,http,1,0\no,a,f,http,2,1\n"));
    file(&dir, "d02.csv", &format!("{header}o,a,g,http,0,7\no,a,f,http,0,1\n"));
    let trace = Trace::open(dir.path()).unwrap();
    assert_eq!((trace.total(), trace.length_ms), (12, 240_000));
    assert_eq!(trace.repairs.duplicate_functions, 1);
    let minutes = |f| {
        let list = all(&trace, TraceOptions::default());
        let minutes = list.iter().filter(|a| a.function == f).map(|a| a.at_us / 60_000_000);
        minutes.collect::<Vec<_>>()
    };
    assert_eq!(minutes(0), [0, 0, 0, 1, 3]);
    assert_eq!(minutes(1), [3; 7]);
}

#[test]
fn azure_2021_calls_begin_their_duration_before_their_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(
        &dir,
        "log.csv",
        "app,func,end_timestamp,duration\na,f,10.5,0.5\na,g,11,10\nb,f,5,0\na,f,1,2\n",
    );
    let trace = Trace::open(&path).unwrap();
    assert_eq!(trace.format, Format::Azure2021);
    let list: Vec<_> = all(&trace, TraceOptions::default())
        .into_iter()
        .map(|a| (a.at_us, trace.functions[a.function as usize].name.clone(), a.duration_us))
        .collect();
    let call = |at, name: &str, us| (at, name.to_owned(), Some(us));
    assert_eq!(
        list,
        [
            call(0, "a/f", 2_000_000),
            call(1_000_000, "a/g", 10_000_000),
            call(5_000_000, "b/f", 0),
            call(10_000_000, "a/f", 500_000)
        ]
    );
    assert_eq!((trace.repairs.backwards, trace.repairs.before_start), (2, 1));
}

#[test]
fn plain_tables_can_be_cut_and_sped_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "t.csv", "time_ms,function,duration_ms\n0,f,1\n1000,f,2\n2000,g,3\n");
    let trace = Trace::open(&path).unwrap();
    let options =
        TraceOptions { speed: 2.0, skip_ms: 500, length_ms: Some(1_000), ..Default::default() };
    assert_eq!(
        all(&trace, options),
        [Arrival { at_us: 250_000, function: 0, duration_us: Some(2_000) }]
    );
    let plain = file(&dir, "p.csv", "\u{feff}time_ms,function\r\n7,\"a,b\"\r\n");
    let trace = Trace::open(&plain).unwrap();
    assert_eq!(trace.functions[0].name, "a,b");
    assert_eq!(all(&trace, TraceOptions::default())[0].duration_us, None);
}

#[test]
fn mistakes_are_named_with_line_and_column() {
    let azure = "HashOwner,HashApp,HashFunction,Trigger,1,2\n";
    for (text, message) in [
        (
            format!("{azure}o,a,f,http,1\n"),
            "trace.csv:2: the header has 6 columns, this line has 5",
        ),
        (format!("{azure}o,a,f,http,1,x\n"), "trace.csv:2, column 6: \"x\" is no number"),
        (
            format!("{azure}\no,a,f,http,-1,0\n"),
            "trace.csv:3, column 5: -1 is not possible for a count of calls: it must be from 0 to \
             1000000000",
        ),
        (format!("{azure}o,a,f,http,0.5,1\n"), "trace.csv:2, column 5: \"0.5\" is no number"),
        (format!("{azure}o,a,,http,0,1\n"), "trace.csv:2, column 3: the function is empty"),
        (
            "HashOwner,HashApp,HashFunction,Trigger,1,3\n".to_owned(),
            "trace.csv:1, column 6: minute 3 does not follow the one before it: the minutes must be \
             consecutive",
        ),
        ("app,func,end_timestamp\na,f,1\n".to_owned(), "trace.csv:1: there is no column duration"),
        (
            "time_ms,function\n1e99,f\n".to_owned(),
            "trace.csv:2, column 1: 1e99 is not possible for a time in ms: it must be from 0 to \
             3200000000000",
        ),
        ("time_ms,function\n1,\"f\n".to_owned(), "trace.csv:2: a quotation mark is not closed"),
        ("time_ms,function\n".to_owned(), "trace.csv: the trace has no arrivals"),
    ] {
        assert_eq!(problem(&text), message);
    }
    assert!(problem("a,b\n").contains("no known trace format"));
    assert!(problem("").contains("no known trace format"));
    assert!(matches!(Trace::open("/nonexistent/trace.csv".as_ref()), Err(TraceError::Io { .. })));
}

#[test]
fn a_line_without_an_end_does_not_fill_the_memory() {
    let text = format!("time_ms,function\n1,{}", "x".repeat(3 << 20));
    assert_eq!(problem(&text), "trace.csv:2: the line is longer than 1048576 bytes");
}

#[test]
fn a_made_trace_has_the_published_shape() {
    let dir = tempfile::tempdir().unwrap();
    let making = Making { seed: 3, functions: 400, minutes: 480, calls: 300_000 };
    let files = make(dir.path(), making).unwrap();
    let trace = Trace::open(dir.path()).unwrap();
    assert_eq!(trace.total(), files.calls);
    assert!((200_000..450_000).contains(&trace.total()), "{}", trace.total());
    assert_eq!(trace.functions.len(), 400);
    assert_eq!(trace.repairs, medes_trace::Repairs::default());
    let at_most = |n: u64| trace.functions.iter().filter(|f| f.arrivals <= n).count();
    // 45 % at most hourly, 81 % at most once a minute; bursts blur it a little.
    assert!((160..230).contains(&at_most(8)), "{}", at_most(8));
    assert!((300..345).contains(&at_most(480)), "{}", at_most(480));
    let mut durations: Vec<_> =
        trace.functions.iter().map(|f| f.duration_ms.as_ref().unwrap().median()).collect();
    durations.sort_by(f64::total_cmp);
    assert!((400.0..1_200.0).contains(&durations[200]), "{}", durations[200]);
    let again = tempfile::tempdir().unwrap();
    let files_again = make(again.path(), making).unwrap();
    for (a, b) in [
        (files.invocations, files_again.invocations),
        (files.durations, files_again.durations),
        (files.memory, files_again.memory),
    ] {
        assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap());
    }
}

proptest! {
    #[test]
    fn whatever_is_in_a_file_it_is_read_or_refused(text in "(time_ms,function,duration_ms\n)?[0-9,.\"a-f\\-\n]{0,200}") {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, "t.csv", &text);
        if let Ok(trace) = Trace::open(&path) {
            let list = all(&trace, TraceOptions::default());
            prop_assert_eq!(list.len() as u64, trace.total());
            prop_assert!(list.is_sorted_by_key(|a| a.at_us));
        }
    }
}

#[test]
fn what_is_wrong_beside_the_calls_is_named_or_repaired_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let calls =
        "HashOwner,HashApp,HashFunction,Trigger,1\no,a,f,http,1\no,a,g,http,1\no,b,h,http,1\n";
    file(&dir, "invocations.csv", calls);
    let percentiles = "percentile_Average_0,percentile_Average_1,percentile_Average_25,\
                       percentile_Average_50,percentile_Average_75,percentile_Average_99,\
                       percentile_Average_100";
    let header =
        format!("HashOwner,HashApp,HashFunction,Average,Count,Minimum,Maximum,{percentiles}\n");
    let write = |rows: &str| file(&dir, "durations.csv", &format!("{header}{rows}"));
    let memory = |rows: &str| {
        file(
            &dir,
            "memory.csv",
            &format!("HashOwner,HashApp,SampleCount,AverageAllocatedMb\n{rows}"),
        )
    };
    write(
        "o,a,f,5,3,1,9,1,1,4,5,6,8,9\no,a,f,7,3,1,9,1,1,4,7,8,8,9\no,a,g,5,3,1,9,9,8,7,6,5,4,3\n",
    );
    memory("o,a,1,100\no,a,1,200\n");
    let trace = Trace::open(dir.path()).unwrap();
    let r = trace.repairs;
    assert_eq!((r.duplicate_values, r.unsorted_percentiles), (2, 1));
    assert_eq!((r.without_durations, r.without_memory), (1, 1));
    assert_eq!(r.list().len(), 4);
    assert_eq!(trace.functions[0].duration_ms.as_ref().unwrap().median(), 5.0);
    assert_eq!(trace.functions[0].memory, Some(100 << 20));

    let message = || Trace::open(dir.path()).unwrap_err().to_string();
    memory("o,a,1,-5\n");
    assert!(message().contains("memory.csv:2, column 4: -5 is not possible"), "{}", message());
    memory("o,a,1,100\n");
    write("o,a,f,5,3,1,9,1,1,4,lots,6,8,9\n");
    assert!(
        message().contains("durations.csv:2, column 11: \"lots\" is no number"),
        "{}",
        message()
    );
    file(&dir, "durations.csv", &header.replace(",percentile_Average_75", ""));
    assert!(message().contains("durations.csv:1: there is no column"), "{}", message());
}

#[test]
fn memory_does_not_grow_with_the_trace() {
    let peak = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.csv");
    let mut out = std::io::BufWriter::new(std::fs::File::create(&path).unwrap());
    std::io::Write::write_all(&mut out, b"time_ms,function\n").unwrap();
    // Backwards, so that all of it has to be sorted.
    let rows = 4_000_000_u64;
    for i in 0..rows {
        std::io::Write::write_all(&mut out, format!("{},f\n", rows - i).as_bytes()).unwrap();
    }
    drop(out);
    let before = peak();
    let trace = Trace::open(&path).unwrap();
    let mut arrivals = trace.arrivals(TraceOptions::default()).unwrap();
    let mut count = 0;
    while arrivals.next().unwrap().is_some() {
        count += 1;
    }
    assert_eq!((count, trace.repairs.backwards), (rows, rows - 1));
    // In memory they would take 64 MB.
    let grown = peak() - before;
    assert!(grown < 48 << 20, "{grown} bytes");
}
