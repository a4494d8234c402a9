-- Only in builds with the feature wait_points: places where a race test holds a backend still, and a clock that
-- it moves.
CREATE SCHEMA queue_test;
CREATE FUNCTION queue_test.wait_point_arm(name pg_catalog.text, pid pg_catalog.int4 DEFAULT 0) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'wait_point_arm';
CREATE FUNCTION queue_test.wait_point_release(name pg_catalog.text) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'wait_point_release';
CREATE FUNCTION queue_test.wait_point_reached(name pg_catalog.text) RETURNS pg_catalog.int8
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'wait_point_reached';
CREATE FUNCTION queue_test.clock_shift(mono pg_catalog.interval, wall pg_catalog.interval) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'clock_shift';
