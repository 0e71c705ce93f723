//! Draws one chart of each kind into the directory that is named: `cargo run -p plots --example gallery -- DIR`.

use plots::{Bar, Chart, Curve, Series, distributions, lines, stacked_bars};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args_os().nth(1).ok_or("the directory to write into is missing")?;
    for (name, chart) in [("distributions", spread()?), ("bars", phases()?), ("lines", density()?)] {
        for path in chart.write(Path::new(&dir), name)? {
            println!("{}", path.display());
        }
    }
    Ok(())
}

/// Latencies with a long tail.
fn spread() -> Result<Chart, plots::PlotError> {
    let curve = |name: &str, least: f64, median: f64, tail: f64| {
        let value = |n: i32| {
            let share = f64::from(n) / 200.0;
            let body = (share / (1.02 - share)).powf(0.22);
            least + (median - least) * body + tail * share.powi(60)
        };
        Curve { name: name.into(), quantiles: (0..=200).map(value).collect() }
    };
    let curves = [
        curve("file, warm shell", 640.0, 790.0, 400.0),
        curve("file, no shell", 1_450.0, 1_720.0, 1_900.0),
        curve("shared, warm shell", 820.0, 1_010.0, 1_300.0),
        curve("shared, no shell", 1_700.0, 2_050.0, 2_600.0),
    ];
    distributions("How soon a restored clone answers", "µs", &curves)
}

/// Phases of an operation.
fn phases() -> Result<Chart, plots::PlotError> {
    let names = ["open", "check", "memory", "devices", "interrupts", "vcpus", "page server", "resume", "notify"];
    let bar = |name: &str, sizes: [f64; 9]| Bar {
        name: name.into(),
        parts: names.iter().map(|name| (*name).into()).zip(sizes).collect(),
    };
    let bars = [
        bar("file, warm shell", [31.0, 58.0, 142.0, 76.0, 40.0, 168.0, 0.0, 52.0, 6.0]),
        bar("file, no shell", [33.0, 61.0, 420.0, 240.0, 95.0, 610.0, 0.0, 88.0, 7.0]),
        bar("shared, warm shell", [30.0, 55.0, 90.0, 78.0, 41.0, 171.0, 352.0, 57.0, 5.0]),
        bar("shared, no shell", [34.0, 60.0, 210.0, 245.0, 97.0, 622.0, 505.0, 91.0, 6.0]),
    ];
    stacked_bars("What a restore spends its time on, medians", "µs", &bars)
}

/// What clones cost by how many there are.
fn density() -> Result<Chart, plots::PlotError> {
    let series = |name: &str, first: f64, each: f64, wave: f64| Series {
        name: name.into(),
        points: (1..=1_000).map(f64::from).map(|n| (n, first + each * n + wave * (n / 37.0).sin())).collect(),
    };
    let all = [
        series("private memory of all", 40.0, 2.9, 25.0),
        series("shared memory", 128.0, 0.04, 0.0),
        series("page tables", 0.5, 0.41, 3.0),
    ];
    lines("What clones cost that are alive at once", "clones", "MiB", &all)
}
