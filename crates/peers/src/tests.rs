//! Ranks as threads: what the board tells whom.

use std::thread;
use std::time::{Duration, Instant};

use longspan_hal::{Error, Step};

use crate::board::kind;
use crate::wire::write;
use crate::{Board, Fields, Member, Place, Reach};

const LIMIT: Duration = Duration::from_secs(20);
const STEP: Step = Step { phase: "ring forward", index: 3 };

/// Runs `body` on `size` ranks of one group; what they return, in rank order.
fn on_ranks<T: Send>(size: u32, limit: Duration, body: impl Fn(Member) -> T + Sync) -> Vec<T> {
    let place = Board::open(Reach::Host).expect("a socket");
    let (place, body) = (&place, &body);
    thread::scope(|scope| {
        let start = |rank| scope.spawn(move || body(Member::join(place, rank, size, limit).expect("all come")));
        let all: Vec<_> = (0..size).map(start).collect();
        all.into_iter().map(|t| t.join().expect("no panic")).collect()
    })
}

#[test]
fn offers_come_in_rank_order_and_a_gather_is_for_rank_0() {
    let large = vec![7; 3 << 20];
    on_ranks(4, LIMIT, |me| {
        for round in 0..20u64 {
            let offers = me.agree("offer", &Fields::default().number(u64::from(me.rank) + round)).expect("all offer");
            let wanted: Vec<Vec<u8>> = (0..4).map(|r| Fields::default().number(r + round).0).collect();
            assert_eq!(offers, wanted);
        }
        let gathered = me.gather("results", &Fields(large.clone())).expect("all offer");
        assert_eq!(gathered, if me.rank == 0 { vec![large.clone(); 4] } else { vec![] });
    });
}

#[test]
fn another_call_is_named_on_every_rank() {
    let errors = on_ranks(3, LIMIT, |me| {
        let name = if me.rank == 2 { "prepare" } else { "window" };
        me.agree(name, &Fields::default()).expect_err("not the same").to_string()
    });
    assert!(errors.iter().all(|e| e.contains("window") && e.contains("prepare")), "{errors:?}");
}

#[test]
fn who_leaves_or_gives_up_or_dies_is_named_with_its_step() {
    let leave: [fn(Member); 3] = [
        drop,
        |me| me.abort(),
        |me| {
            let _ = thread::spawn(move || {
                let _me = me;
                std::panic::resume_unwind(Box::new("dies"));
            })
            .join();
        },
    ];
    for leave in leave {
        let errors = on_ranks(3, LIMIT, |me| {
            if me.rank == 1 {
                me.progress(STEP);
                leave(me);
                return None;
            }
            Some(me.agree("prepare", &Fields::default()).expect_err("one is missing"))
        });
        let lost = Error::PeerLost { rank: 1, call: "prepare", step: STEP, late: None };
        assert_eq!(errors, [Some(lost.clone()), None, Some(lost)]);
    }
}

#[test]
fn a_connection_that_ends_without_a_word_is_a_death() {
    // Nobody waits in a call: the fault alone ends the group.
    let faults = on_ranks(2, LIMIT, |me| {
        if me.rank == 1 {
            me.progress(STEP);
            me.cut();
            return None;
        }
        Some(me.wait_for_fault("exchange"))
    });
    assert_eq!(faults[0], Some(Error::PeerLost { rank: 1, call: "exchange", step: STEP, late: None }));
}

#[test]
fn who_stays_away_is_named_after_the_limit() {
    let limit = Duration::from_millis(200);
    let errors = on_ranks(3, limit, |me| {
        if me.rank == 2 {
            return Some(me.wait_for_fault("its own wait"));
        }
        me.agree("prepare", &Fields::default()).err()
    });
    for error in errors {
        assert!(matches!(error, Some(Error::PeerLost { rank: 2, late, .. }) if late == Some(limit)), "{error:?}");
    }
}

#[test]
fn a_round_that_does_not_end_names_who_is_behind_or_who_is_waited_for() {
    for (queued, lost) in [(1, 1), (2, 2)] {
        let errors = on_ranks(3, LIMIT, |me| {
            me.queued(if me.rank == 1 { queued } else { 2 });
            me.agree("queued", &Fields::default()).expect("all come");
            if me.rank == 0 {
                me.stuck(2, 2, true);
            }
            me.wait_for_fault("exchange")
        });
        assert!(errors.iter().all(|e| matches!(e, Error::PeerLost { rank, .. } if *rank == lost)), "{errors:?}");
    }
}

#[test]
fn a_round_that_all_queued_names_whose_device_is_furthest_behind() {
    let errors = on_ranks(4, LIMIT, |me| {
        me.queued(9);
        me.began([5, 5, 3, 6][me.rank as usize]);
        me.agree("queued", &Fields::default()).expect("all come");
        if me.rank == 3 {
            me.stuck(6, 3, true);
        }
        me.wait_for_fault("exchange")
    });
    assert!(errors.iter().all(|e| matches!(e, Error::PeerLost { rank: 2, .. })), "{errors:?}");
}

/// Who left was through with all its rounds, and is in nobody's way.
#[test]
fn who_left_after_its_rounds_is_not_the_one_behind() {
    let errors = on_ranks(3, LIMIT, |me| {
        me.queued(2);
        me.began(if me.rank == 1 { 1 } else { 2 });
        me.agree("queued", &Fields::default()).expect("all come");
        if me.rank == 0 {
            return None;
        }
        if me.rank == 2 {
            thread::sleep(Duration::from_millis(50));
            me.stuck(2, 2, true);
        }
        Some(me.wait_for_fault("exchange"))
    });
    let lost = Some(Error::PeerLost { rank: 1, call: "exchange", step: Step::default(), late: Some(LIMIT) });
    assert_eq!(errors, [None, lost.clone(), lost]);
}

#[test]
fn a_limit_may_be_further_away_than_the_clock_can_say() {
    let met = on_ranks(2, Duration::MAX, |me| me.agree("prepare", &Fields::default()).is_ok());
    assert_eq!(met, [true, true]);
}

#[test]
fn a_rank_that_left_is_lost_to_those_who_queue_more_than_it_did() {
    // Before the board hears that it left, and after.
    for wait in [0, 50] {
        let errors = on_ranks(3, LIMIT, |me| {
            me.queued(2);
            if me.rank == 1 {
                return None;
            }
            if me.rank == 0 {
                thread::sleep(Duration::from_millis(wait));
                assert_eq!(me.fault("exchange"), None, "it queued all that the others did");
                me.queued(3);
            }
            Some(me.wait_for_fault("exchange"))
        });
        let lost = Some(Error::PeerLost { rank: 1, call: "exchange", step: Step::default(), late: None });
        assert_eq!(errors, [lost.clone(), None, lost]);
    }
}

#[test]
fn a_rank_that_does_not_answer_is_lost_where_one_is_stuck() {
    let place = Board::open(Reach::Host).expect("a socket");
    let mut silent = place.connect(LIMIT).expect("it listens");
    let hello = Fields::default().bytes(place.word()).number(1).number(2).bytes(b"one that hangs");
    write(&mut silent, kind::JOIN, &hello).expect("a socket");
    let me = Member::join(&place, 0, 2, LIMIT).expect("both came");
    me.queued(1);
    me.stuck(1, 0, true);
    assert!(matches!(me.wait_for_fault("exchange"), Error::PeerLost { rank: 1, .. }));
}

#[test]
fn a_rank_that_sees_others_do_something_else_ends_the_group_for_all() {
    let errors = on_ranks(3, LIMIT, |me| match me.rank {
        1 => me.refuse("round", "rank 0 runs another"),
        _ => me.wait_for_fault("exchange"),
    });
    assert!(errors.iter().all(|e| *e == Error::invalid("round", "rank 0 runs another")), "{errors:?}");
}

#[test]
fn who_leaves_in_order_is_lost_to_those_who_still_need_it() {
    let errors = on_ranks(2, LIMIT, |me| match me.rank {
        1 => {
            me.leave();
            None
        }
        _ => me.agree("prepare", &Fields::default()).err(),
    });
    assert!(matches!(errors[0], Some(Error::PeerLost { rank: 1, .. })), "{errors:?}");
}

#[test]
fn strangers_and_second_comers_are_refused() {
    let short = Duration::from_millis(300);
    let place = Board::open(Reach::Host).expect("a socket");
    let bytes = place.to_bytes();
    let stranger = [&bytes[..8], &[0; 16], &bytes[24..]].concat();
    let stranger = Place::from_bytes(&stranger).expect("another word");
    assert!(Member::join(&stranger, 0, 2, short).is_err_and(|e| e.to_string().contains("another group")));
    assert!(Member::join(&place, 2, 2, short).is_err_and(|e| matches!(e, Error::Invalid { .. })));
    thread::scope(|scope| {
        // One of the two gets the place, the other is told that it is taken.
        let twice = [0, 1].map(|_| scope.spawn(|| Member::join(&place, 0, 2, LIMIT).map(drop)));
        while !twice.iter().any(thread::ScopedJoinHandle::is_finished) {
            thread::sleep(Duration::from_millis(1));
        }
        let _second = Member::join(&place, 1, 2, LIMIT).expect("the last");
        let errors = twice.map(|t| t.join().expect("no panic").err()).into_iter().flatten().collect::<Vec<_>>();
        assert!(errors.len() == 1 && errors[0].to_string().contains("taken"), "{errors:?}");
    });
}

#[test]
fn who_waits_alone_is_told_how_many_came() {
    let (place, start) = (Board::open(Reach::Host).expect("a socket"), Instant::now());
    match Member::join(&place, 0, 2, Duration::from_millis(300)) {
        Err(Error::Timeout { call, .. }) => assert!(call.contains("1 rank came"), "{call}"),
        other => panic!("{other:?}"),
    }
    assert!(start.elapsed() < LIMIT);
}

#[test]
fn a_hosted_board_tells_of_the_lost_rank_and_ends_when_all_left() {
    let (places, place) = std::sync::mpsc::channel();
    let (tell, told) = std::sync::mpsc::channel();
    let host = thread::spawn(move || {
        let announce = move |place: &Place| places.send(place.clone()).map_err(std::io::Error::other);
        Board::host(Reach::Host, announce, move |lost| drop(tell.send(lost)))
    });
    let place = place.recv().expect("announced");
    thread::scope(|scope| {
        for rank in 0..3 {
            let place = &place;
            scope.spawn(move || {
                let me = Member::join(place, rank, 3, LIMIT).expect("all come");
                me.progress(STEP);
                if rank == 2 { me.cut() } else { drop(me.wait_for_fault("exchange")) }
            });
        }
    });
    let lost = told.recv().expect("one was lost");
    assert_eq!((lost.rank, lost.step), (2, STEP));
    assert!(lost.who.contains(&std::process::id().to_string()), "{}", lost.who);
    host.join().expect("no panic").expect("served");
    assert!(told.recv().is_err(), "one rank is named, the first");
}
