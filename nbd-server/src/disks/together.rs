//! The same thing done to many files, by many threads at once: each of them waits
//! for a flush, and a file system makes what several wait for durable together.

use std::sync::Mutex;

/// More who wait at once gain nothing.
const THREADS_MAX: usize = 32;

/// Do `work` to each of `items`; the results come in their order. A single one is
/// done here.
pub(super) fn each<T: Send, U: Send>(items: Vec<T>, work: impl Fn(T) -> U + Sync) -> Vec<U> {
    let threads = items.len().min(THREADS_MAX);
    if threads <= 1 {
        return items.into_iter().map(work).collect();
    }
    let mut results: Vec<Option<U>> = items.iter().map(|_| None).collect();
    let todo = Mutex::new(items.into_iter().zip(&mut results));
    let help = || {
        loop {
            let next = todo.lock().expect("no holder of this lock panics").next();
            let Some((item, result)) = next else {
                return;
            };
            *result = Some(work(item));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            let builder = std::thread::Builder::new().name("maker".into());
            if builder.spawn_scoped(scope, help).is_err() {
                // Fewer do as well.
                break;
            }
        }
        help();
    });
    drop(todo);
    let results = results.into_iter();
    results.map(|one| one.expect("all were done")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_items() {
        for count in [0, 1, 2, 500] {
            let doubled = each((0..count).collect(), |item: i32| item * 2);
            assert_eq!(doubled, (0..count).map(|item| item * 2).collect::<Vec<_>>());
        }
    }
}
