//! Work that is split over the CPUs that there are.

use std::ops::Range;
use std::thread::Builder;

/// Splits `count` pieces of work into runs of at least `least` pieces, one for each CPU, and returns what `work` makes of each run, in
/// order. What no thread can be had for is done by the caller's own.
pub fn split<T: Send, E: Send>(
    count: u64,
    least: u64,
    work: impl Fn(Range<u64>) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let most = count / least.max(1);
    // How many CPUs there are is told by files, which takes a while.
    let cpus = if most > 1 { std::thread::available_parallelism().map_or(1, usize::from) as u64 } else { 1 };
    let share = count.div_ceil(cpus.min(most).max(1)).max(1);
    let parts: Vec<Range<u64>> =
        (0..count).step_by(share as usize).map(|at| at..at.saturating_add(share).min(count)).collect();
    let work = &work;
    std::thread::scope(|scope| {
        let begin = |part: &Range<u64>| {
            let (part, own) = (part.clone(), part.clone());
            (own, Builder::new().spawn_scoped(scope, move || work(part)).ok())
        };
        // The first is for the thread that would only wait.
        let others: Vec<_> = parts.iter().skip(1).map(begin).collect();
        let mut all = Vec::with_capacity(parts.len());
        all.extend(parts.first().map(|part| work(part.clone())).transpose()?);
        for (part, thread) in others {
            all.push(match thread {
                Some(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?,
                None => work(part)?,
            });
        }
        Ok(all)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_piece_is_done_once_and_in_order(count in 0u64..5000, least in 0u64..600, bad in any::<Option<u64>>()) {
            let runs = split(count, least, |run| Ok::<_, ()>(run.clone()));
            prop_assert!(runs.unwrap().into_iter().flatten().eq(0..count));
            let bad = bad.map(|bad| bad % 6000);
            let done = split(count, least, |run| bad.filter(|bad| run.contains(bad)).map_or(Ok(()), Err));
            prop_assert_eq!(done.is_err(), bad.is_some_and(|bad| bad < count));
        }
    }
}
