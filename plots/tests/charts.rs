//! Charts as those see them who ask for them: documents that can be read, pictures with something on them, and errors that
//! say where.

use plots::{Bar, Chart, Curve, PlotError, Series, distributions, lines, stacked_bars};
use proptest::prelude::*;
use tiny_skia::Pixmap;

fn curve(name: &str, quantiles: &[f64]) -> Curve {
    Curve { name: name.into(), quantiles: quantiles.to_vec() }
}

fn bar(name: &str, parts: &[(&str, f64)]) -> Bar {
    Bar { name: name.into(), parts: parts.iter().map(|(name, size)| ((*name).into(), *size)).collect() }
}

fn line(name: &str, points: &[(f64, f64)]) -> Series {
    Series { name: name.into(), points: points.to_vec() }
}

/// One of each kind, called this and with things that are called this.
fn each_kind(title: &str, name: &str) -> [Chart; 3] {
    [
        distributions(title, name, &[curve(name, &[700.0, 812.0, 3_000.0])]).unwrap(),
        stacked_bars(title, name, &[bar(name, &[(name, 20.0), ("b", 30.0), ("c", 0.1)])]).unwrap(),
        lines(title, name, name, &[line(name, &[(0.0, 1.0), (1_000.0, 700.0)])]).unwrap(),
    ]
}

/// The texts of a chart, which is a sound document of a bounded size with nothing in it that acts or leads elsewhere.
fn texts(chart: &Chart) -> Vec<String> {
    assert!(chart.svg().len() < 2_000_000, "{} bytes", chart.svg().len());
    let document = roxmltree::Document::parse(chart.svg()).unwrap();
    let all = || document.descendants().filter(|node| node.is_element());
    for node in all() {
        let known = ["svg", "title", "desc", "rect", "polyline", "circle", "text"];
        assert!(known.contains(&node.tag_name().name()), "{node:?}");
        for number in ["x", "y", "width", "height", "cx", "cy", "r"] {
            let value = node.attribute(number).map(|value| value.parse::<f64>().unwrap());
            assert!(value.is_none_or(|value| (0.0..5_000.0).contains(&value)), "{number} of {node:?}");
        }
    }
    all().filter_map(|node| node.text()).map(Into::into).collect()
}

fn picture(chart: &Chart) -> Pixmap {
    Pixmap::decode_png(&chart.png().unwrap()).unwrap()
}

fn inked(picture: &Pixmap) -> usize {
    picture.pixels().iter().filter(|pixel| pixel.red() < 0xe0).count()
}

#[test]
fn each_kind_is_a_sound_document_and_a_picture_of_twice_its_size() {
    for chart in each_kind("A title", "a name") {
        assert!(texts(&chart).contains(&"A title".into()));
        let document = roxmltree::Document::parse(chart.svg()).unwrap();
        let units = |side: &str| document.root_element().attribute(side).unwrap().parse::<u32>().unwrap();
        let picture = picture(&chart);
        assert_eq!((picture.width(), picture.height()), (1_800, 2 * units("height")));
        assert_eq!(picture.width(), 2 * units("width"));
        assert!(inked(&picture) > 1_000);
        assert!(picture.pixels().iter().all(|pixel| pixel.alpha() == 0xff));
    }
}

#[test]
fn pictures_have_text_without_any_font_of_the_machine() {
    for (short, long) in each_kind("i", "a").iter().zip(each_kind("A title of some words", "a")) {
        // Nothing but the title is different.
        assert!(inked(&picture(&long)) > inked(&picture(short)) + 2_000);
    }
}

#[test]
fn figures_are_in_the_charts() {
    let [distribution, bars, lines] = each_kind("A title", "µs");
    assert!(texts(&distribution).contains(&"p50 812 · p99 2,923 µs".into()), "{:?}", texts(&distribution));
    assert!(texts(&bars).contains(&"50.1 µs".into()) && texts(&bars).contains(&"other".into()));
    assert!(texts(&lines).contains(&"1,000".into()));
}

#[test]
fn names_come_out_as_text_whatever_is_in_them() {
    let evil = "</text><script>a&b\"'</script>\0\u{1b}[31m\n\u{ffff}\u{202e}<![CDATA[";
    for chart in each_kind(evil, evil) {
        assert!(texts(&chart).iter().any(|text| text.starts_with("</text><script>a&b\"'")));
        picture(&chart);
    }
    for long in ["a".repeat(10_000), "字".repeat(10_000), "a\u{301}".repeat(10_000), "🦀".repeat(10_000)] {
        for chart in each_kind(&long, &long) {
            assert!(texts(&chart).iter().any(|text| text.ends_with('…')) && chart.svg().len() < 20_000);
        }
    }
    let widest = "W".repeat(100);
    texts(&stacked_bars(&widest, &widest, &[bar(&widest, &[(&widest, 1e15 - 1.0)])]).unwrap());
    each_kind("", "").iter().for_each(|chart| assert!(texts(chart).contains(&"(no name)".into())));
}

#[test]
fn bad_numbers_are_refused_and_named() {
    let message = |chart: Result<Chart, PlotError>| chart.unwrap_err().to_string();
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e16] {
        let e = message(distributions("", "", &[curve("c", &[1.0, bad])]));
        assert!(e.starts_with("quantile 1 of curve \"c\": "), "{e}");
        let e = message(stacked_bars("", "", &[bar("b", &[("p", bad)])]));
        assert!(e.starts_with("part \"p\" of bar \"b\": "), "{e}");
        for point in [(bad, 0.0), (0.0, bad)] {
            let e = message(lines("", "", "", &[line("l", &[(0.0, 0.0), point])]));
            assert!(e.starts_with("point 1 of line \"l\": "), "{e}");
        }
    }
    for bad in [0.0, -1.0, f64::MIN_POSITIVE] {
        assert!(message(distributions("", "", &[curve("c", &[bad, 1.0])])).contains("quantile 0"));
    }
    assert!(message(distributions("", "", &[curve("c", &[2.0, 1.0])])).contains("less than the one before"));
    assert!(message(stacked_bars("", "", &[bar("b", &[("p", -1.0)])])).contains("below 0"));
}

#[test]
fn empty_lists_are_refused() {
    let empty = |chart: Result<Chart, PlotError>| matches!(chart, Err(PlotError::Empty(_)));
    assert!(empty(distributions("", "", &[])) && empty(stacked_bars("", "", &[])) && empty(lines("", "", "", &[])));
    assert!(empty(distributions("", "", &[curve("", &[])])) && empty(distributions("", "", &[curve("", &[1.0])])));
    assert!(empty(stacked_bars("", "", &[bar("", &[])])) && empty(lines("", "", "", &[line("", &[])])));
}

#[test]
fn many_of_each_are_drawn_and_more_are_refused() {
    let name = |n: usize| format!("the one with number {n}");
    let curves = |most| (0..most).map(|n| curve(&name(n), &[1.0, 2.0 + n as f64])).collect::<Vec<_>>();
    let bars = |most| (0..most).map(|n| bar(&name(n), &[("a", n as f64)])).collect::<Vec<_>>();
    let series = |most| (0..most).map(|n| line(&name(n), &[(n as f64, 1.0)])).collect::<Vec<_>>();
    let many = |chart: Result<Chart, PlotError>| matches!(chart, Err(PlotError::TooMany { .. }));
    for chart in [
        distributions("", "", &curves(21)).unwrap(),
        stacked_bars("", "", &bars(40)).unwrap(),
        lines("", "", "", &series(21)).unwrap(),
    ] {
        assert!(texts(&chart).contains(&name(20)));
        picture(&chart);
    }
    assert!(many(distributions("", "", &curves(22))) && many(stacked_bars("", "", &bars(41))));
    assert!(many(lines("", "", "", &series(22))));
}

#[test]
fn very_many_values_make_no_large_chart() {
    let values: Vec<f64> = (1..500_000).map(f64::from).collect();
    assert!(distributions("", "", &[curve("", &values)]).unwrap().svg().len() < 100_000);
    let points: Vec<(f64, f64)> = values.iter().map(|n| (n * 7_919.0 % 1_000.0, n.sin())).collect();
    assert!(lines("", "", "", &[line("", &points)]).unwrap().svg().len() < 100_000);
    let parts: Vec<(String, f64)> = values.iter().map(|n| (n.to_string(), 1.0)).collect();
    assert!(stacked_bars("", "", &[Bar { name: String::new(), parts }]).unwrap().svg().len() < 10_000);
}

#[test]
fn equal_values_and_zeros_have_charts() {
    for value in [1e-9, 1.0, 812.0, 1e15] {
        picture(&distributions("", "µs", &[curve("", &[value; 5])]).unwrap());
    }
    for value in [0.0, 1e-300, 1e-9, 7.0, 1e15] {
        texts(&stacked_bars("", "µs", &[bar("", &[("a", value / 2.0), ("b", value / 2.0)])]).unwrap());
        for value in [value, -value] {
            texts(&lines("", "", "", &[line("", &[(value, value); 3])]).unwrap());
        }
    }
}

/// Any number at all, and numbers that can be drawn more often than not.
fn number() -> impl Strategy<Value = f64> {
    prop_oneof![1 => any::<f64>(), 8 => (-12.0..16.0f64).prop_map(|exponent| 10f64.powf(exponent)), 1 => -1e3..1e3f64]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_in_is_refused_or_drawn(
        title in any::<String>(),
        name in any::<String>(),
        numbers in proptest::collection::vec(number(), 0..8),
    ) {
        let mut quantiles: Vec<f64> = numbers.clone();
        quantiles.sort_by(f64::total_cmp);
        let parts = numbers.iter().map(|size| (name.clone(), *size)).collect();
        let points = numbers.iter().zip(numbers.iter().rev()).map(|(x, y)| (*x, *y)).collect();
        let charts = [
            distributions(&title, &name, &[Curve { name: name.clone(), quantiles }]),
            stacked_bars(&title, &name, &[Bar { name: name.clone(), parts }]),
            lines(&title, &title, &title, &[Series { name, points }]),
        ];
        for chart in charts.into_iter().flatten() {
            texts(&chart);
        }
    }
}
