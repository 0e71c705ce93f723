//! Where an axis has its ticks, and how numbers are written.

/// An axis: from where to where, and its ticks in between, all ascending.
#[derive(Debug, Clone, PartialEq)]
pub struct Ticks {
    /// Its first value.
    pub lo: f64,
    /// Its last value.
    pub hi: f64,
    /// Ticks with a number.
    pub major: Vec<Tick>,
    /// Ticks without.
    pub minor: Vec<f64>,
}

/// A tick with its number.
#[derive(Debug, Clone, PartialEq)]
pub struct Tick {
    /// Where it is.
    pub value: f64,
    /// What it says.
    pub label: String,
}

/// The least range that an even axis has, as a share of its values: what numbers with few digits can tell apart.
const LEAST_SHARE: f64 = 1e-9;
/// The least range of all.
const LEAST_RANGE: f64 = 1e-12;

/// An even axis over `lo..=hi`, from a tick to a tick, with at most `most` steps of 1, 2 or 5 times a power of ten; `most`
/// is at least 2.
pub fn linear(lo: f64, hi: f64, most: usize) -> Ticks {
    let (lo, hi) = widened(lo, hi);
    let (step, first, last) = steps(lo, hi)
        .map(|step| (step, (lo / step.size()).floor() as i64, (hi / step.size()).ceil() as i64))
        .find(|(_, first, last)| (last - first) as usize <= most.max(2))
        .expect("a step as long as the range is from one tick to the next but one at most");
    let major: Vec<Tick> = (first..=last).map(|count| step.tick(count)).collect();
    Ticks { lo: step.tick(first).value, hi: step.tick(last).value, major, minor: Vec::new() }
}

/// A logarithmic axis that has `lo..=hi` inside, both above 0, with at most `most` numbers; `most` is at least 5:
/// of fewer there might be a single one.
///
/// Over few decades ticks are at 1, 2, 5 and if there is room at 3 and 7 times a power of ten; over many at powers of ten;
/// and over less than one, even steps tell more.
pub fn logarithmic(lo: f64, hi: f64, most: usize) -> Ticks {
    let most = most.max(5);
    let least = 1.02;
    let (lo, hi) = if hi / lo < least { (lo / least, hi * least) } else { (lo, hi) };
    // A little room, so that a curve neither begins nor ends at an edge.
    let room = (hi / lo).powf(0.02);
    let (lo, hi) = (lo / room, hi * room);
    let inside = |value: &f64| (lo..=hi).contains(value);
    if hi / lo < 6.0 {
        let even = |most| linear(lo, hi, most).major.into_iter().filter(|tick| inside(&tick.value)).collect::<Vec<_>>();
        // An even axis has a tick at or beyond each end.
        let major = (2..=most + 1).rev().map(even).find(|major| major.len() <= most).unwrap_or_default();
        return Ticks { lo, hi, major, minor: Vec::new() };
    }
    let decades = lo.log10().floor() as i32..=hi.log10().ceil() as i32;
    let at = |digits: &[i64], every: i32| -> Vec<Tick> {
        let decades = decades.clone().filter(|exponent| exponent.rem_euclid(every) == 0);
        let ticks = decades.flat_map(|exponent| digits.iter().map(move |digit| scaled(*digit, exponent)));
        ticks.filter(|tick| inside(&tick.value)).collect()
    };
    let within_decades = [&[1, 2, 3, 5, 7][..], &[1, 2, 5]].into_iter().map(|digits| at(digits, 1));
    let of_decades = (1..).map(|every| at(&[1], every));
    let major = within_decades.chain(of_decades).find(|ticks| ticks.len() <= most).unwrap_or_default();
    let minor: Vec<f64> = at(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 1).into_iter().map(|tick| tick.value).collect();
    // Over very many decades they would be a grey area.
    let minor = if minor.len() <= 80 { minor } else { Vec::new() };
    Ticks { lo, hi, minor: minor.into_iter().filter(|v| !major.iter().any(|tick| tick.value == *v)).collect(), major }
}

/// A number for people: all digits left of the point, in groups of three, and as many right of it as make three in all.
pub fn figure(value: f64) -> String {
    let whole_digits = if value == 0.0 { 1 } else { value.abs().log10().floor() as i32 + 1 };
    let decimals = usize::try_from((3 - whole_digits).clamp(0, 9)).unwrap_or(0);
    let text = grouped(value, decimals);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
}

/// A range with room for ticks.
fn widened(lo: f64, hi: f64) -> (f64, f64) {
    if lo == 0.0 && hi == 0.0 {
        return (0.0, 1.0);
    }
    let least = (LEAST_SHARE * lo.abs().max(hi.abs())).max(LEAST_RANGE);
    (lo, hi.max(lo + least))
}

/// A distance between ticks: 1, 2 or 5 times a power of ten.
#[derive(Debug, Clone, Copy)]
struct Step {
    digit: i64,
    exponent: i32,
}

impl Step {
    fn size(self) -> f64 {
        scaled(self.digit, self.exponent).value
    }

    fn tick(self, count: i64) -> Tick {
        scaled(count * self.digit, self.exponent)
    }
}

/// Longer and longer steps, from far less than the range on.
fn steps(lo: f64, hi: f64) -> impl Iterator<Item = Step> {
    let first = (hi - lo).log10().floor() as i32 - 2;
    (first..).flat_map(|exponent| [1, 2, 5].map(|digit| Step { digit, exponent }))
}

/// `count` times a power of ten, exactly where it can be.
fn scaled(count: i64, exponent: i32) -> Tick {
    // A negative power of ten is not exact, dividing by a positive one is.
    let value = if exponent < 0 { count as f64 / 10f64.powi(-exponent) } else { count as f64 * 10f64.powi(exponent) };
    let decimals = if count == 0 { 0 } else { usize::try_from(-exponent).unwrap_or(0) };
    Tick { value, label: grouped(value, decimals) }
}

/// A number with so many decimals, and commas between thousands.
fn grouped(value: f64, decimals: usize) -> String {
    let digits = format!("{:.decimals$}", value.abs());
    let (whole, fraction) = digits.split_once('.').map_or((&digits[..], None), |(whole, rest)| (whole, Some(rest)));
    let mut text = String::new();
    if value < 0.0 && digits.contains(|c: char| c.is_ascii_digit() && c != '0') {
        text.push('−');
    }
    for (number, digit) in whole.chars().enumerate() {
        if number > 0 && (whole.len() - number).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if let Some(fraction) = fraction {
        text.push('.');
        text.push_str(fraction);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn labels(ticks: &Ticks) -> Vec<&str> {
        ticks.major.iter().map(|tick| tick.label.as_str()).collect()
    }

    #[test]
    fn an_even_axis_has_round_numbers() {
        assert_eq!(labels(&linear(0.0, 1000.0, 5)), ["0", "200", "400", "600", "800", "1,000"]);
        assert_eq!(labels(&linear(0.0, 0.23, 5)), ["0", "0.05", "0.10", "0.15", "0.20", "0.25"]);
        assert_eq!(labels(&linear(-1.0, 1.0, 4)), ["−1.0", "−0.5", "0", "0.5", "1.0"]);
        assert_eq!(labels(&linear(0.0, 0.0, 5)), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
    }

    #[test]
    fn a_logarithmic_axis_has_finer_numbers_the_less_it_spans() {
        assert_eq!(labels(&logarithmic(1.0, 1e6, 8)), ["1", "10", "100", "1,000", "10,000", "100,000", "1,000,000"]);
        assert_eq!(labels(&logarithmic(90.0, 2_100.0, 8)), ["100", "200", "300", "500", "700", "1,000", "2,000"]);
        assert_eq!(labels(&logarithmic(90.0, 2_100.0, 6)), ["100", "200", "500", "1,000", "2,000"]);
        assert_eq!(
            labels(&logarithmic(1_010.0, 1_350.0, 8)),
            ["1,050", "1,100", "1,150", "1,200", "1,250", "1,300", "1,350"]
        );
        assert_eq!(logarithmic(1.0, 100.0, 5).minor[..3], [2.0, 3.0, 4.0]);
    }

    #[test]
    fn figures_have_as_many_digits_as_tell_something() {
        let figures = [0.0, 0.012_345, 1.0, 9.876, 12.34, 123.4, 1_234.4, 1_234_567.8, -1_000.0].map(figure);
        assert_eq!(figures, ["0", "0.0123", "1", "9.88", "12.3", "123", "1,234", "1,234,568", "−1,000"]);
    }

    /// Any size that a chart may be asked for.
    fn size() -> impl Strategy<Value = f64> {
        (-9.0..15.0f64).prop_map(|exponent| 10f64.powf(exponent))
    }

    fn ascending(ticks: &Ticks) -> bool {
        ticks.major.is_sorted_by(|a, b| a.value < b.value) && ticks.minor.is_sorted_by(|a, b| a < b)
    }

    fn labels_differ(ticks: &Ticks) -> bool {
        let labels = labels(ticks);
        (1..labels.len()).all(|number| labels[number] != labels[number - 1])
    }

    proptest! {
        #[test]
        fn an_even_axis_covers_its_values_with_few_ticks(a in size(), b in size(), signs in 0..4, most in 2usize..12) {
            let (a, b) = (if signs & 1 == 0 { a } else { -a }, if signs & 2 == 0 { b } else { -b });
            let ticks = linear(a.min(b), a.max(b), most);
            prop_assert!(ticks.lo <= a.min(b) && ticks.hi >= a.max(b));
            prop_assert!((2..=most + 1).contains(&ticks.major.len()));
            prop_assert!(ascending(&ticks) && labels_differ(&ticks));
            prop_assert_eq!((ticks.lo, ticks.hi), (ticks.major[0].value, ticks.major[ticks.major.len() - 1].value));
        }

        #[test]
        fn an_even_axis_over_nearly_nothing_is_an_axis(a in size(), most in 2usize..12) {
            let ticks = linear(a, a * (1.0 + f64::EPSILON), most);
            prop_assert!(ticks.lo < ticks.hi && ticks.major.len() >= 2 && ascending(&ticks));
        }

        #[test]
        fn a_logarithmic_axis_covers_its_values_with_few_ticks(a in size(), b in size(), most in 5usize..12) {
            let ticks = logarithmic(a.min(b), a.max(b), most);
            prop_assert!(0.0 < ticks.lo && ticks.lo < a.min(b) && ticks.hi > a.max(b));
            prop_assert!((2..=most).contains(&ticks.major.len()), "{:?}", ticks);
            prop_assert!(ascending(&ticks) && labels_differ(&ticks) && ticks.minor.len() <= 80);
            let mut all = ticks.major.iter().map(|tick| tick.value).chain(ticks.minor.iter().copied());
            prop_assert!(all.all(|value| (ticks.lo..=ticks.hi).contains(&value)));
        }

        #[test]
        fn a_narrow_logarithmic_axis_has_ticks_too(a in size(), ratio in 1.0..8.0, most in 5usize..12) {
            let ticks = logarithmic(a, a * ratio, most);
            prop_assert!((2..=most).contains(&ticks.major.len()), "{:?}", ticks);
        }

        #[test]
        fn a_figure_is_read_back_nearly_as_it_was(value in size()) {
            let read: f64 = figure(value).replace(',', "").parse().unwrap();
            prop_assert!((read - value).abs() <= value * 0.01 + 1e-9, "{} is written {}", value, figure(value));
        }
    }
}
